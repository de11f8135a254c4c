"""`megascale eval`: a checkpoint judged by the tasks of lm-eval."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.commands.export_model import SPECIAL_IDS
from megascale.errors import UserError
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, require_outputs

if TYPE_CHECKING:
    from megascale.checkpoint.load import Found
    from megascale.convert.huggingface.kept import Kept
    from megascale.convert.score_text import TextScorer, TextTokens

MOST_TOKENS = 256
"""Of a continuation whose task says nothing, as lm-eval has it."""
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which a task may say it; lm-eval takes the first that is there."""
NO_SETTINGS = (*SPECIAL_IDS, "transformers_version", "_from_model_config")
"""What a generation_config.json says besides how text is generated."""
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
    from megascale.convert.huggingface.kept import Kept
    from megascale.convert.one_rank import open_model, run_config
    from megascale.convert.score_text import TextScorer
    from megascale.run.start import home_of

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1; leave it out for all questions")
    found = find_at(args.checkpoint)
    kept = Kept.of(home_of(found.folder.resolve()))
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
        print("".join(f"note: {note}\n" for note in _notes_on_generation(kept)), end="")
    if args.out is not None:
        _write(Path(args.out), str(found.folder), results)
    return 0


def text_tokens(found: Found, config: Any, given: str | None) -> TextTokens:
    """The tokenizer of a checkpoint; see `tokenizer_folder`.

    A text begins with the token that stood before documents in training. With a Hugging Face
    tokenizer that is what it puts before a text itself, else its beginning of sequence, or its end
    where it has none. It ends with the id that ends documents, or with an `eos_token_id` that an
    import has kept. Raises UserError.
    """
    from megascale.commands.export_model import load_theirs, require_known, tokenizer_folder
    from megascale.convert.score_text import TextTokens
    from megascale.corpus.sources import CORPUS_FILE
    from megascale.corpus.tokenizers import load_hf, load_tokenizer
    from megascale.infowindow.tokenizer import InfoWindowTokenizer

    folder = tokenizer_folder(found, config, given)
    if folder is None:
        raise UserError(f"{found.folder} names no tokenizer; give --tokenizer FOLDER")
    if (folder / CORPUS_FILE).is_file():
        ours = load_tokenizer(folder)
        first_id, end_id = ours.bos_id, ours.eod_id
    else:
        ours = load_hf(str(folder))
        theirs, end_id = load_theirs(folder), ours.eod_id
        first_id = theirs.bos_token_id if ours.bos_id is None else ours.bos_id
    require_known(ours.vocab_size, config.model.vocab_size, folder)
    return TextTokens(
        lambda text: ours.encode(text).tolist(),
        ours.decode,
        end_id if first_id is None else first_id,
        frozenset({end_id, *_kept_ends(found, folder, config.model.vocab_size)}),
        unsettled=ours.window_tokens if isinstance(ours, InfoWindowTokenizer) else 0,
    )


def _kept_ends(found: Found, folder: Path, vocab_size: int) -> Iterator[int]:
    """The ids that end a text by what an import has kept, unless `folder` has another tokenizer."""
    from megascale.convert.huggingface.kept import Kept
    from megascale.convert.huggingface.tokenizer import relation
    from megascale.run.start import home_of

    kept = Kept.of(home_of(found.folder.resolve()))
    if kept is None or relation(folder, kept.folder) == "other":
        return
    for document in (kept.config, kept.generation or {}):
        ends = document.get("eos_token_id")
        for token_id in ends if isinstance(ends, list) else [ends]:
            if isinstance(token_id, int) and token_id < vocab_size:
                yield token_id


def _notes_on_generation(kept: Kept | None) -> Iterator[str]:
    """Which settings of an import's generation_config.json have no effect here."""
    settings = {} if kept is None else kept.generation or {}
    unused = [
        f"{name} = {value}"
        for name, value in settings.items()
        if value is not None and name not in NO_SETTINGS
    ]
    if unused:
        yield (
            "generation is greedy; of the generation_config.json of the import these settings "
            f"have no effect here: {', '.join(unused)}"
        )


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


def lm_eval_model(scorer: TextScorer) -> Any:
    """`scorer` as a model of lm-eval."""
    from lm_eval.api.model import LM

    class CheckpointModel(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            judged = scorer.continuations([request.args for request in requests])
            return [(one.log_likelihood, one.is_greedy) for one in judged]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [scorer.whole(request.args[0]) for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [_generate(scorer, *request.args) for request in requests]

    return CheckpointModel()


def _generate(scorer: TextScorer, prompt: str, options: dict[str, Any]) -> str:
    sampled = options.get("do_sample")
    if options.get("temperature") if sampled is None else sampled:
        raise UserError("a task asks for sampled text; megascale eval continues greedily only")
    stops = options.get("until") or []
    given = (options[name] for name in LENGTH_OPTIONS if options.get(name) is not None)
    most = int(next(given, MOST_TOKENS))
    return scorer.generate(prompt, [stops] if isinstance(stops, str) else stops, most)


def _write(path: Path, checkpoint: str, results: Any) -> None:
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    document = {"checkpoint": checkpoint} | {k: results[k] for k in kept if k in results}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, json.dumps(document, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; choose another file") from None
