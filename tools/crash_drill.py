"""Kill a run with SIGKILL at random moments, resume it, and compare with one that was not killed.

Used by the golden test (a few kills) and by `tools/bench.py resume` (twenty).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Drill:
    """What came of a drill."""

    kills: int
    kills_inside_a_save: int
    steps: int
    bit_equal: bool
    """Loss, gradient norm, tokens and held-out loss of every step."""
    worst_relative: float
    """Largest relative difference of a loss."""


def drill(config: Path, folder: Path, kills: int, world: int = 2, seed: int = 0) -> Drill:
    """Train `config` once untouched and once with `kills` kills; both under `folder`."""
    calm, shaken = folder / "calm", folder / "shaken"
    finish(start(config, calm, world))
    expected = curve(calm)
    generator, inside = random.Random(seed), 0
    for left in range(kills, 0, -1):
        process = start(config, shaken, world, "--resume", "auto")
        _wait_for_a_step(process, shaken)
        # twice the even share at most, so that some kills lie close and the run is not done early
        time.sleep(generator.uniform(0, 1.6 * _seconds_left(shaken, expected) / (left + 1)))
        inside += _is_saving(shaken)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(start(config, shaken, world, "--resume", "auto"))
    return compare(expected, curve(shaken), kills, inside)


def compare(expected: dict, found: dict, kills: int = 0, inside: int = 0) -> Drill:
    """Hold one curve against another; both must have the same steps, each once."""
    if expected.keys() != found.keys():
        raise AssertionError(f"steps differ: {sorted(expected.keys() ^ found.keys())}")
    keys = ("loss", "grad_norm", "tokens_seen", "lr", "eval")
    same = all(expected[s].get(k) == found[s].get(k) for s in expected for k in keys)
    worst = max(abs(found[s]["loss"] / expected[s]["loss"] - 1) for s in expected)
    return Drill(kills, inside, len(expected), same, worst)


def start(config: Path, run_dir: Path, world: int, *words: str) -> subprocess.Popen:
    """Start training in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--standalone", "-m", "megascale", "train", str(config)]
    command += [f"run_dir={run_dir}", *words]
    return subprocess.Popen(
        command,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout_s: float = 150) -> str:
    """Wait for the end of a run; its output. Raises AssertionError where it failed."""
    output, _ = process.communicate(timeout=timeout_s)
    if process.returncode:
        raise AssertionError(f"training ended with {process.returncode}:\n{output[-4000:]}")
    return output


def curve(run_dir: Path) -> dict[int, dict]:
    """Rows of metrics.jsonl by step; scores join the row of their step."""
    rows: dict[int, dict] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind = "eval" if "eval" in row else "loss"
        if kind in rows.get(row["step"], {}):
            raise AssertionError(f"step {row['step']} has two rows of {kind}")
        rows.setdefault(row["step"], {}).update(row)
    return rows


def _num_rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _num_starts(run_dir: Path) -> int:
    path = run_dir / "events.jsonl"
    return path.read_text().count('"start"') if path.exists() else 0


def _wait_for_a_step(process: subprocess.Popen, run_dir: Path, timeout_s: float = 120) -> None:
    """Until this start has done a step, so that each kill costs the run something."""
    deadline, starts = time.monotonic() + timeout_s, _num_starts(run_dir)
    while _num_starts(run_dir) == starts:
        _still_running(process, deadline)
    rows = _num_rows(run_dir)
    while _num_rows(run_dir) <= rows:
        _still_running(process, deadline)


def _still_running(process: subprocess.Popen, deadline: float) -> None:
    time.sleep(0.01)
    if process.poll() is not None or time.monotonic() > deadline:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        raise AssertionError(f"no step was done:\n{process.communicate()[0][-4000:]}")


def _seconds_left(run_dir: Path, expected: dict) -> float:
    left = len(expected) - _num_rows(run_dir)
    return max(0.05, left * min(row["step_s"] for row in expected.values()))


def _is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".tmp-*"))
