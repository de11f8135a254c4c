"""Faults over one run, which has to get over each without a person: `python tools/drill.py`.

Two nodes of one rank train under `megascale launch` on this machine. A job whose drivers have
ended is started again, as Slurm would requeue it (`slurm/train.sbatch`); nothing else is done for
the run. Between two faults it trains some steps and saves. At the end its curve is held against
that of a run which nothing befell but the NaN gradients, which change what is learned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
from crash_drill import compare, curve  # noqa: E402
from drill_faults import FAULTS, UNDISTURBED, draw  # noqa: E402
from drill_scene import WORDS, Scene, environment  # noqa: E402
from drive import Job  # noqa: E402

COUNTS = {
    "kill -9 of a worker": 6,
    "kill -9 of an agent": 5,
    "kill -9 of a driver": 3,
    "kill -9 of the leading driver": 3,
    "hang (SIGSTOP)": 5,
    "slow rank": 3,
    "NaN gradients": 4,
    "bit flip in a checkpoint": 4,
    "truncated checkpoint": 4,
    "full disk": 3,
    "lost heartbeat channel": 3,
    "clock jump": 3,
    "requeue": 4,
}
"""Fifty."""
RESULTS = Path(__file__).parents[1] / "configs/results"
STEPS_BETWEEN = 6
"""That a run trains before the next fault, with a save among them."""
DISK_MIB = 48


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    kind: str
    step: int
    """At which it was done."""
    detection_s: float
    """Until the system noticed; for a slow rank and a full disk with what it lasted before."""
    recovery_s: float
    """Until a step was done that the run had not done before."""
    starts: int
    """Of the ranks, that followed."""


@dataclass(frozen=True)
class Result:
    """What became of a drill."""

    outcomes: Sequence[Outcome]
    steps: int
    bit_equal: bool
    """To the undisturbed run: loss, gradient norm, tokens and held-out loss of every step."""
    false_alarms: int
    """Hangs that were seen and were none."""
    goodput: float
    """Time in steps that count over wall time."""
    wall_s: float


def drill(config: Path, folder: Path, faults: Sequence[str], seed: int = 0) -> Result:
    """Do all this to a run of `config`, below `folder`, and compare it with one left alone.

    Raises AssertionError where it does not get over a fault by itself.
    """
    began = time.monotonic()
    with disk_of_its_own(folder, "full disk" in faults) as disk:
        scene = Scene(config, folder, disk, seed)
        try:
            outcomes = [befall(scene, kind) for kind in faults]
            _let_end(scene)
        finally:
            scene.close()
        wall_s = time.monotonic() - began
        false_alarms = scene.count("hang") - sum(kind == "hang (SIGSTOP)" for kind in faults)
        found = curve(scene.run_dir)
    last = max(found)
    expected = calm_curve(config, folder, last)
    if "eval" not in found[last]:  # a run that ends evaluates, and one that is stopped does not
        expected[last].pop("eval", None)
    useful_s = sum(row["step_s"] for row in found.values() if not row["skipped"])
    same = compare(expected, found).bit_equal
    return Result(outcomes, len(found), same, false_alarms, useful_s / wall_s, wall_s)


def befall(scene: Scene, kind: str) -> Outcome:
    """One fault, once the run has trained and saved for a while."""
    first = scene.step()
    scene.wait_for(
        lambda: scene.step() >= first + STEPS_BETWEEN and scene.saved() > first, f"before {kind}"
    )
    step, starts = scene.step(), scene.count("start")
    injected, began = FAULTS[kind](scene), time.monotonic()
    scene.wait_for(injected.noticed, f"{kind} is noticed")
    detection_s = time.monotonic() - began
    injected.mend()
    reached = max(step, scene.step())
    scene.wait_for(lambda: scene.step() > reached, f"{kind} is got over")
    outcome = Outcome(
        kind, step, detection_s, time.monotonic() - began, scene.count("start") - starts
    )
    if kind in UNDISTURBED and outcome.starts:
        raise AssertionError(f"{kind}: ranks were started again\n{scene.said()}")
    print(
        f"step {step:>5}  {kind:<30} noticed in {outcome.detection_s:5.1f} s, "
        f"got over in {outcome.recovery_s:5.1f} s",
        flush=True,
    )
    return outcome


def _let_end(scene: Scene) -> None:
    """Have the run train some more, save and stop."""
    last = scene.step() + STEPS_BETWEEN
    scene.wait_for(lambda: scene.step() >= last, "the end")
    for driver in scene.job.drivers:
        driver.terminate()
    statuses = scene.job.finish()
    assert statuses == [0, 0], scene.said()


def calm_curve(config: Path, folder: Path, steps: int) -> dict[int, dict]:
    """Of a run that is left alone, but for the NaN gradients, for so many steps."""
    run_dir = folder / "calm"
    words = (*WORDS, f"train.stop_after_steps={steps}")
    with Job(
        config, run_dir, 2, *words, job="8", environment=environment(folder / "control")
    ) as job:
        assert job.finish(3600) == [0, 0], job.said()
    return curve(run_dir)


@contextmanager
def disk_of_its_own(folder: Path, is_needed: bool) -> Iterator[Path]:
    """A small tmpfs, which takes root; or just a folder, where none is needed."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    with ExitStack() as leave:
        if is_needed:
            size = f"size={DISK_MIB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "drill", disk], check=True)
            leave.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
        yield disk


def can_mount() -> bool:
    """Whether this process may make a file system of its own."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "drill", folder]
        if subprocess.run(mount, capture_output=True).returncode != 0:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def table(result: Result) -> str:
    """The result in lines of Markdown."""
    lines = ["| fault | times | noticed, s | got over, s |", "|---|---|---|---|"]
    for kind, its in by_kind(result).items():
        noticed = _shown([one.detection_s for one in its])
        over = _shown([one.recovery_s for one in its])
        lines.append(f"| {kind} | {len(its)} | {noticed} | {over} |")
    return "\n".join(lines)


def by_kind(result: Result) -> Mapping[str, list[Outcome]]:
    """The outcomes of each kind of fault, in the order of FAULTS."""
    kinds = {kind: [one for one in result.outcomes if one.kind == kind] for kind in FAULTS}
    return {kind: its for kind, its in kinds.items() if its}


def _shown(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.1f} ({max(seconds):.1f})"


def draw_picture(result: Result, path: Path) -> None:
    """Seconds until faults were noticed and got over, by kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = by_kind(result)
    figure = Figure(figsize=(9, 0.6 + 0.32 * len(kinds)), dpi=130)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, its in enumerate(kinds.values()):
        for name, colour in (("recovery_s", "#2166ac"), ("detection_s", "#d95f02")):
            seconds = [getattr(one, name) for one in its]
            label = {"recovery_s": "got over", "detection_s": "noticed"}[name] if not row else None
            axes.barh(row, median(seconds), color=colour, alpha=0.5, height=0.7, label=label)
            axes.plot(seconds, [row] * len(seconds), "o", color=colour, markersize=3)
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.invert_yaxis()
    axes.set(xlabel="seconds after the fault")
    axes.set_title(
        f"{len(result.outcomes)} faults in {result.steps} steps, goodput {result.goodput:.0%}",
        fontsize=10,
    )
    axes.legend(loc="lower right")
    figure.savefig(path)


def main() -> int:
    """Run the drill and keep what came of it."""
    parser = argparse.ArgumentParser(prog="drill.py", description=__doc__)
    parser.add_argument("--short", action="store_true", help="one fault of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for drill.json and .png")
    arguments = parser.parse_args()
    counts = dict.fromkeys(COUNTS, 1) if arguments.short else dict(COUNTS)
    if not can_mount():
        print("warning: a disk of its own takes root; left out: full disk", flush=True)
        del counts["full disk"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = drill(write_config(folder), folder, draw(counts, arguments.seed), arguments.seed)
    print(table(result))
    print(
        f"{len(result.outcomes)} faults, {result.steps} steps, bit-equal to the undisturbed run: "
        f"{result.bit_equal}, {result.false_alarms} false alarms of a hang, goodput "
        f"{result.goodput:.1%} of {result.wall_s:.0f} s"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = json.loads(json.dumps(asdict(result)), parse_float=lambda text: round(float(text), 3))
    (arguments.out / "drill.json").write_text(f"{json.dumps(kept, indent=1)}\n")
    draw_picture(result, arguments.out / "drill.png")
    return 0 if result.bit_equal and not result.false_alarms else 1


def write_config(folder: Path, **changes: str) -> Path:
    """A small model that trains for longer than a drill lasts, and saves often; `changes` replace
    whole sections."""
    from tiny_corpus import tiny_config

    return tiny_config(
        folder / "corpus",
        model="{num_layers: 2, hidden_size: 64, num_heads: 2}",
        train="{tokens: 20M, precision: fp32, threads: 1}",
        **changes,
    )


if __name__ == "__main__":
    sys.exit(main())
