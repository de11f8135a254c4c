"""Small runs for `reproduce.py`: corpora of real text, runs in processes of one thread, scores."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "configs" / "results"


def corpora(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Prepare those of the recipes `names` that this machine has text of; their names."""
    for name in names:
        out = folder / name
        if not (out / "corpus.json").exists():
            command = [sys.executable, "-m", "megascale", "prepare", f"data/{name}.yaml"]
            done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=environment())
            if done.returncode:
                continue
        yield name


def all_corpora(folder: Path, names: Sequence[str]) -> None:
    """Prepare the recipes `names`, or exit."""
    missing = set(names) - set(corpora(folder, names))
    if missing:
        first = min(missing)
        raise SystemExit(
            f"reproduce.py: no text of {first}; data/{first}.yaml says what to install"
        )


def train(run: Path, config: dict[str, Any], *after: Sequence[str]) -> None:
    """Train `config` in the run_dir `run`, then run the megascale commands `after`; all but
    once, so that a reproduction which was stopped goes on. Exits where one fails."""
    finished = run / "reproduced"
    if finished.exists():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    written = run.with_name(f"{run.name}.yaml")
    written.write_text(yaml.safe_dump({**config, "run_dir": str(run)}), encoding="utf-8")
    for words in (["train", str(written), "--resume", "auto"], *after):
        done = subprocess.run(
            [sys.executable, "-m", "megascale", *words],
            env=environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{run.name}: megascale {words[0]}: {done.stderr[-2000:]}")
    finished.touch()


def environment() -> dict[str, str]:
    """Of a process with one thread that finds this megascale."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def rows(run: Path) -> list[dict[str, Any]]:
    """What a run wrote of its steps and evaluations."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scores(run: Path) -> dict[str, float]:
    """Held-out bits per byte of each source at the end of a run."""
    last = [row["eval"] for row in rows(run) if "eval" in row][-1]
    return {source: score["bits_per_byte"] for source, score in last.items()}


def in_parallel(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """What `jobs` return, run as many at a time as there are cores, with an ETA."""
    began, found = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        running = [pool.submit(job) for job in jobs]
        for done, one in enumerate(running, start=1):
            try:
                found.append(one.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            left_s = (time.monotonic() - began) / done * (len(jobs) - done)
            print(f"{done} of {len(jobs)}, about {left_s / 60:.0f} min left", file=sys.stderr)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds, least and most."""
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}


def shown(one: dict[str, float], digits: int = 3) -> str:
    """A `spread` for a table."""
    return f"{one['mean']:.{digits}f} ({one['least']:.{digits}f} to {one['most']:.{digits}f})"
