"""Cases for every verb that is light: its command line, or a file that it reads, is changed."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Callable, Sequence

from fuzz import mutate, readers
from fuzz.harness import Target, Wrong
from fuzz.scene import COST, DOCUMENTS, LINEAGE, OUTPUTS, RECIPE, SPLIT, Scene

Rng = random.Random
VERBS: dict[str, tuple[Target, int]] = {}
"""Name to a target and its weight."""
MAY_FAIL = ("data check", "checkpoint verify")
"""Verbs that say on stdout, and by their status, that what they looked at is damaged."""


def call(words: Sequence[str]) -> None:
    """Run a command line in this process. Raises Wrong where its end is none for a user."""
    from megascale.cli import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(words))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    lines = [line for line in err.getvalue().splitlines() if line.startswith("megascale:")]
    if status in (1, 2) and " ".join(words[:2]) in MAY_FAIL and out.getvalue() and not lines:
        return
    if status not in (0, 2):
        raise Wrong(f"{words}: status {status}: {err.getvalue()[-500:]}")
    if status == 2 and (len(lines) != 1 or len(lines[0]) > 4100 or "Traceback" in err.getvalue()):
        raise Wrong(f"{words}: not one line: {err.getvalue()[-500:]!r}")


def verb(name: str, weight: int, *examples: str) -> None:
    """Enter a target that changes one of the command lines `examples`."""

    def target(rng: Rng, scene: Scene) -> None:
        head = name.split("_")
        call([*head, *mutate.words(rng, rng.choice(examples).split())])

    VERBS[f"megascale {name}"] = (target, weight)


def of_file(name: str, weight: int) -> Callable[[Target], Target]:
    """Enter a target that changes a file."""

    def enter(target: Target) -> Target:
        VERBS[f"megascale {name}"] = (target, weight)
        return target

    return enter


verb("hparams_steplaw", 2, "--params 1B --tokens 100B", "--params 1B --tokens 100B --moe --json")
verb(
    "hparams_growth",
    2,
    "--target-params 7B --tokens 2T --layers 32",
    "--target-params 7B --tokens 2T --json",
)
verb("lineage", 1, "run", "run --among .", "run/checkpoints/00000004")
verb("checkpoint_list", 1, "whole")
verb("checkpoint_verify", 1, "whole", "whole/checkpoints/00000004")
verb(
    "data_check",
    1,
    "corpora/corpus",
    "corpora/corpus --context 128",
    "corpora/corpus/train --vocab-size 257 --eod-id 256 --bos-id 3",
    "config.yaml data.max_epochs=1 data.context_tokens=64",
)
verb("status", 1, "run", "run --json")
verb("report", 1, "run --out out.html")
SMALL = "--ranks 64 --steps 1 --batch-tokens 64Ki --budget-s 0"
verb(
    "simulate",
    1,
    f"{SMALL} --context 4Ki --lengths github",
    f"{SMALL} --lengths file:lengths.txt --planners hybrid",
    f"{SMALL} --lengths corpus:corpora/corpus --tensor 2",
)
BATCH = "--lengths lengths.txt --ranks 4 --capacity 512"
verb(
    "plan",
    3,
    "config.yaml --ranks 2",
    "config.yaml train.tokens=20M model.num_layers=3 optim.lr=1e-3",
    "full.yaml --ranks 4 --json out.json",
    "full.yaml --ranks 2 data.context_tokens=64 parallel.expert=1",
    f"{BATCH} --cost cost.json",
    f"{BATCH} --mode aligned --pp 2 --planner hybrid",
)


@of_file("plan_config", 4)
def plan_config(rng: Rng, scene: Scene) -> None:
    """`plan` of a changed config."""
    value = readers.a_config(rng, scene)
    readers.written(scene, "case.yaml", mutate.yaml_text(rng, value))
    call(["plan", "case.yaml", "--ranks", rng.choice(("1", "2", "4"))])


@of_file("plan_cost", 1)
def plan_cost(rng: Rng, scene: Scene) -> None:
    """`plan --lengths` with changed files."""
    readers.written(scene, "case.json", mutate.json_bytes(rng, COST))
    lines = scene.bytes_of("lengths.txt").splitlines()
    lines[rng.randrange(len(lines))] = str(rng.choice(mutate.NUMBERS)).encode()
    readers.written(scene, "case.txt", b"\n".join(lines))
    call(
        [
            "plan",
            "--lengths",
            "case.txt",
            "--ranks",
            "4",
            "--capacity",
            "1Ki",
            "--cost",
            "case.json",
        ]
    )


@of_file("plot_run", 1)
def plot_run(rng: Rng, scene: Scene) -> None:
    """`plot` of changed logs."""
    readers.run_of(rng, scene)
    call(["plot", "run", "--out", "plots"])


@of_file("plot_schedule", 1)
def plot_schedule(rng: Rng, scene: Scene) -> None:
    """`plot --schedule` of a changed config."""
    readers.written(scene, "case.yaml", mutate.yaml_text(rng, readers.a_config(rng, scene)))
    call(["plot", "--schedule", "case.yaml", "--out", "schedule.png"])


@of_file("report_run", 1)
def report_run(rng: Rng, scene: Scene) -> None:
    """`report` of changed logs."""
    readers.run_of(rng, scene)
    call(["report", "run", "--out", "out.html"])


@of_file("lineage_file", 1)
def lineage_file(rng: Rng, scene: Scene) -> None:
    """`lineage` of a changed lineage.json."""
    readers.written(scene, "child/lineage.json", mutate.json_bytes(rng, LINEAGE))
    call(["lineage", "child"])
    call(["lineage", "whole", "--among", "."])


@of_file("checkpoint_file", 1)
def checkpoint_file(rng: Rng, scene: Scene) -> None:
    """`checkpoint list` and `verify` of a changed manifest."""
    name = "run/checkpoints/00000004/manifest.json"
    readers.written(scene, name, mutate.json_bytes(rng, scene.manifest))
    call(["checkpoint", "list", "run"])
    call(["checkpoint", "verify", "run"])
    call(["checkpoint", "prune", "run", "--keep-last", "1", "--dry-run"])


@of_file("submit", 2)
def submit(rng: Rng, scene: Scene) -> None:
    """`submit --dry-run`."""
    examples = (
        "config.yaml --nodes 2 --ranks-per-node 1 --time 12:00:00",
        "config.yaml --nodes 1-2 --spare-nodes 1 --gpus-per-node 2 --save-s 300 --name x",
        "config.yaml --sweep sweep.txt --partition p --sbatch=--constraint=h100",
        "corpus.yaml --job prepare --nodes 2 --mpi pmix",
    )
    call(["submit", *mutate.words(rng, rng.choice(examples).split()), "--dry-run"])


@of_file("prepare", 1)
def prepare(rng: Rng, scene: Scene) -> None:
    """`prepare` of a changed recipe, or of changed documents."""
    shutil.rmtree(scene.folder / "made", ignore_errors=True)
    if rng.random() < 0.5:
        example = rng.choice((RECIPE, SPLIT, OUTPUTS))
        readers.written(scene, "case.yaml", mutate.yaml_text(rng, example))
        call(["prepare", "case.yaml", "--out", "made"])
        return
    readers.written(scene, "case.jsonl", readers.a_log(rng, DOCUMENTS))
    inputs = "inputs=[{kind: jsonl, paths: [case.jsonl]}]"
    if rng.random() < 0.5:
        inputs = "inputs=[{kind: jsonl, paths: [case.jsonl], source_column: meta.from}]"
    call(["prepare", "corpus.yaml", "--out", "made", inputs])


@of_file("infowindow", 1)
def infowindow(rng: Rng, scene: Scene) -> None:
    """`infowindow inspect`, `encode`, `decode`, `compile`."""
    book = scene.codebook.name
    examples = (
        f"encode small.txt out.eqi --codebook {book}",
        f"decode out.eqi out.txt --codebook {book}",
        f"inspect {book} --text small.txt --rows 3 --picture out.png",
        f"compile {book} --out other.safetensors --code ac --bits 16",
    )
    call(["infowindow", *mutate.words(rng, rng.choice(examples).split())])


@of_file("any_verb", 2)
def any_verb(rng: Rng, scene: Scene) -> None:
    """The words of verbs that would train, and of none."""
    examples = (
        "train",
        "launch --x",
        "doctor --nonsense",
        "calibrate",
        "branch",
        "grow",
        "eval",
        "export",
        "import",
        "experts",
        "checkpoint",
        "infowindow",
        "--version",
        "--help",
        "plan --help",
        "x y",
        "train missing.yaml train.tokens=1",
        "grow missing --operator stack --factor 4 --out x",
    )
    call(mutate.words(rng, rng.choice(examples).split()))
