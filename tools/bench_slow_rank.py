"""One of two ranks is held up: steps with and without measured speeds.

Each rank is pinned to a core of its own; rank 1 is stopped for a third of the time, a few
milliseconds at once, as a throttled processor would be. The same run is trained with
`planner.rank_speeds` `equal` and `measured` in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).parent
STOPPED_S, GOES_S = 0.003, 0.006
"""For how long at once rank 1 is stopped, and goes on."""
STEPS, SETTLED = 80, 30
"""Of a run, and those before which speeds are still being measured."""
SPEEDS = ("equal", "measured")
MODEL = "{num_layers: 2, hidden_size: 128, num_heads: 4}"


def bench_slow_rank(options: Sequence[str] = ()) -> None:
    """Train in turns and print the ratio of step times."""
    parser = argparse.ArgumentParser(prog="bench.py slow_rank", description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="default: 3")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(options)
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one for each rank")
    sys.path.insert(0, str(TOOLS.parent / "tests"))
    from tiny_corpus import tiny_config

    seconds: dict[str, list[float]] = {name: [] for name in (*SPEEDS, "alone")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = "global_batch_tokens: 8192"
        config = tiny_config(folder, model=MODEL, planner="{capacity_tokens: 1024}")
        config.write_text(config.read_text().replace("global_batch_tokens: 1024", batch))
        for turn in range(args.turns):
            for kind in seconds:
                taken = _train(config, folder / f"{kind}{turn}", kind)
                seconds[kind].append(taken)
                print(f"turn {turn + 1}, {kind}: {taken:.3f} s per step", flush=True)
    ratios = [b / a for a, b in zip(seconds["equal"], seconds["measured"], strict=True)]
    lost = [b / a for a, b in zip(seconds["alone"], seconds["equal"], strict=True)]
    result = {
        "measured_over_equal": statistics.median(ratios),
        "equal_over_undisturbed": statistics.median(lost),
        "seconds": seconds,
    }
    print(
        f"steps take {result['measured_over_equal']:.2f}x as long with measured speeds as without; "
        f"the slow rank made them {result['equal_over_undisturbed']:.2f}x as long"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _train(config: Path, run_dir: Path, kind: str) -> float:
    """The median seconds of the settled steps of a run; `alone`: no rank is held up."""
    words = [str(config), f"run_dir={run_dir}", f"train.stop_after_steps={STEPS}"]
    words += ["train.tokens=10M", "data.max_epochs=null", "eval.every_steps=0", "eval.tokens=0"]
    words += ["monitor.compare_ranks_every_steps=3", "checkpoint.save_every_steps=0"]
    words += [f"planner.rank_speeds={'measured' if kind == 'measured' else 'equal'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", str(Path(__file__)), kind, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["step_s"] for row in rows[SETTLED:])


def _rank() -> int:
    """One rank, pinned to a core; rank 1 is held up."""
    from megascale.cli import main

    kind, *words = sys.argv[1:]
    rank = int(os.environ["RANK"])
    core = sorted(os.sched_getaffinity(0))[rank]
    os.sched_setaffinity(0, {core})
    if rank == 1 and kind != "alone":
        multiprocessing.get_context("spawn").Process(
            target=_hold_up, args=(os.getpid(),), daemon=True
        ).start()
    return main(["train", *words])


def _hold_up(pid: int) -> None:
    """Stop a process and let it go on, until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        while os.getppid() == pid:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(GOES_S)


if __name__ == "__main__":
    sys.exit(_rank())
