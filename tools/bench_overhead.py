"""What watching costs: step times with heartbeats and timers of ranks on, and off.

Two runs of 2 ranks train under `megascale launch`, as on a cluster, one with everything on and one
with it off. A few steps of one and the same few steps of the other take turns, while the other run
is stopped by a signal, so that both meet the same machine. Each run's first steps are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

TOOLS = Path(__file__).parent
WATCHES = {
    "timers": ("monitor.compare_ranks_every_steps=10", "monitor.compare_ranks_every_steps=0"),
    "heartbeats": ("monitor.heartbeats=true", "monitor.heartbeats=false"),
}
"""What may be switched: on, and off."""
KINDS = ("on", "off")
TURNS, SETTLED, POLL_S = 100, 20, 0.01
TURN = 6
"""Steps; the first one, in which the run was stopped, does not count."""
MODEL = "{num_layers: 4, hidden_size: 128, num_heads: 4}"


def bench_overhead(options: Sequence[str] = ()) -> None:
    """Train in turns and print the ratio of step times."""
    parser = argparse.ArgumentParser(prog="bench.py overhead", description=__doc__)
    help = f"pairs of {TURN} steps; default: {TURNS}"
    parser.add_argument("--turns", type=int, default=TURNS, help=help)
    parser.add_argument(
        "--watch", choices=WATCHES, action="append", help="switch this alone; default: all"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(options)
    if args.turns < 2:
        parser.error("--turns must be at least 2")
    watches = args.watch or list(WATCHES)
    with contextlib.ExitStack() as leave:
        jobs = _jobs(watches, leave)
        for turn in range(args.turns):
            for kind in KINDS if turn % 2 == 0 else reversed(KINDS):
                jobs[kind].step_until(SETTLED + (turn + 1) * TURN)
            if turn % 10 == 9:
                print(
                    f"turn {turn + 1} of {args.turns}: {_ratio(jobs, turn + 1)[0]:.4f}x", flush=True
                )
        ratio, low, high = _ratio(jobs, args.turns)
    print(
        f"{' and '.join(watches)} on: steps take {ratio:.4f}x as long, {low:.4f} to {high:.4f} "
        f"(median of {args.turns} turns, its 95% interval; the goal is at most 1.01)"
    )
    if args.json:
        result = {"watches": watches, "on_over_off": ratio, "interval_95": [low, high]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _ratio(jobs: Mapping[str, _Job], turns: int) -> tuple[float, float, float]:
    """How much longer steps take: the median of the turns, and where it lies in 95 of 100 cases.

    The interval is that of the sign test: it does not mind a turn that something disturbed.
    """
    pairs = zip(*(jobs[kind].turns(turns) for kind in KINDS), strict=True)
    ratios = sorted(on / off for on, off in pairs if not math.isnan(on + off))
    n = len(ratios)
    last = min(math.ceil(n / 2 + 0.98 * math.sqrt(n)), n) - 1
    return statistics.median(ratios), ratios[n - 1 - last], ratios[last]


def _jobs(watches: Sequence[str], leave: contextlib.ExitStack) -> dict[str, _Job]:
    sys.path[:0] = [str(TOOLS.parent), str(TOOLS.parent / "tests")]
    from tiny_corpus import tiny_config

    folder = Path(leave.enter_context(tempfile.TemporaryDirectory()))
    config = tiny_config(folder, model=MODEL, planner="{capacity_tokens: 1024}")
    text = config.read_text().replace("global_batch_tokens: 1024", "global_batch_tokens: 4096")
    config.write_text(text.replace("context_tokens: 128", "context_tokens: 256"))
    jobs = {}
    for place, kind in enumerate(KINDS):
        words = [WATCHES[watch][place] for watch in watches]
        jobs[kind] = leave.enter_context(_Job(config, folder / kind, words))
        jobs[kind].step_until(SETTLED)
    return jobs


class _Job(contextlib.ExitStack):
    """A run that trains only while it is told to."""

    def __init__(self, config: Path, run_dir: Path, words: Sequence[str]) -> None:
        super().__init__()
        self._rows = run_dir / "metrics.jsonl"
        self._ends: dict[int, int] = {}
        self._said = self.enter_context(tempfile.TemporaryFile("w+"))
        words = [*words, "train.tokens=1G", "eval.every_steps=0", "eval.tokens=0"]
        words += ["checkpoint.save_every_steps=0", "--ranks-per-node=2"]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megascale",
                "launch",
                str(config),
                f"run_dir={run_dir}",
                *words,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)},
            stdout=self._said,
            stderr=self._said,
        )
        self.callback(self._tell, signal.SIGKILL)

    def step_until(self, step: int) -> None:
        """Go on until so many steps have been done, then stop."""
        self._tell(signal.SIGCONT)
        while max(self._ends, default=0) < step:
            if self._process.poll() is not None:
                self._said.seek(0)
                raise SystemExit(self._said.read()[-4000:])
            time.sleep(POLL_S)
            with contextlib.suppress(OSError):
                # the whole loop counts, by the time of the file: it matters not when it is seen
                changed = self._rows.stat().st_mtime_ns
                if changed not in self._ends.values():
                    self._ends[self._rows.read_bytes().count(b"\n")] = changed
        self._tell(signal.SIGSTOP)

    def turns(self, count: int) -> list[float]:
        """Seconds per step of every turn; NaN where an end of one was not seen in time."""
        found = []
        for turn in range(count):
            first, last = SETTLED + turn * TURN + 1, SETTLED + (turn + 1) * TURN
            ends = [self._ends.get(step, math.nan) for step in (first, last)]
            found.append((ends[1] - ends[0]) / (last - first) / 1e9)
        return found

    def _tell(self, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
