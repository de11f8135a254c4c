"""`megascale eval`: a checkpoint judged by the tasks of lm-eval."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megascale.errors import UserError
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, require_outputs

RESULTS = json_of("a file of megascale eval --out", "checkpoint", "results")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale eval`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run_dir for its latest")
    add("--tasks", required=True, metavar="NAME[,NAME]", help="tasks of lm-eval")
    add("--include", metavar="DIR", help="folder with task files (YAML) of your own")
    add("--limit", type=int, metavar="N", help="questions per task; default: all")
    add("--fewshot", type=int, metavar="N", help="examples before each question")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    add("--tokenizer", metavar="FOLDER", help="as for megascale export")
    add("--out", metavar="JSON", help="file for the results")


def run_eval(args: argparse.Namespace) -> int:
    """Run the tasks and print a table; returns the exit status. Raises UserError for bad input."""
    if args.out is not None:
        require_outputs([Output("--out", Path(args.out), RESULTS, makes_folders=True)])
    from megascale.runtime import distributed

    distributed.prepare_device("auto")
    from megascale.checkpoint.load import find_at
    from megascale.convert.lm_eval_model import lm_eval_model
    from megascale.convert.one_rank import open_model, run_config
    from megascale.convert.score_text import TextScorer
    from megascale.run.checkpoint_tokenizer import settings_without_effect, text_tokens

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1; leave it out for all questions")
    found = find_at(args.checkpoint)
    tokens = text_tokens(found, run_config(found), args.tokenizer)
    names, manager = _load_tasks(args.tasks, args.include)
    import lm_eval
    from lm_eval.utils import make_table

    with open_model(found, args.precision) as model:
        results: Any = lm_eval.simple_evaluate(
            model=lm_eval_model(TextScorer(model, tokens)),
            tasks=names,
            task_manager=manager,
            num_fewshot=args.fewshot,
            limit=args.limit,
            log_samples=False,
        )
    print(f"{found.folder}, step {found.manifest.position.step}")
    print(make_table(results))
    if any(task["output_type"] == "generate_until" for task in results["configs"].values()):
        print("".join(f"note: {note}\n" for note in settings_without_effect(found)), end="")
    if args.out is not None:
        _write(Path(args.out), str(found.folder), results)
    return 0


def _load_tasks(tasks: str, include: str | None) -> tuple[list[str], Any]:
    """Names and lm-eval's manager of tasks, with their data sets read."""
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise UserError(f"--include {include}: no such folder")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=include)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise UserError(
            f"--tasks {tasks}: lm-eval has no {', '.join(unknown) or 'task without a name'}; "
            "lm_eval ls tasks lists them, and --include adds a folder of your own"
        )
    try:
        manager.load(names)
    except Exception as error:  # whatever a data set's loader raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--tasks {tasks}: the data cannot be read: {reason}") from None
    return names, manager


def _write(path: Path, checkpoint: str, results: Any) -> None:
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    document = {"checkpoint": checkpoint} | {k: results[k] for k in kept if k in results}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, json.dumps(document, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; choose another file") from None
