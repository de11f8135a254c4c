"""Metrics of a run: `metrics.jsonl` first, TensorBoard and other trackers beside it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megascale.monitor import trackers as trackers_of
from megascale.monitor.background import Background
from megascale.monitor.lines import LineFile, json_line
from megascale.parsing import read_json_rows
from megascale.runtime.files import write_file
from megascale.runtime.terminal import escape_controls

METRICS_FILE = "metrics.jsonl"
MOST_STEPS = 2**53
"""Whole numbers up to here are exact as floats, too."""
FINISH_S = 30.0
"""What trackers may take to send the last rows."""


class MetricsWriter:
    """Writes rows to `metrics.jsonl`, and passes them to TensorBoard and the named trackers.

    A row holds `step` and numbers, or `step` and `{"eval": {source: {name: number}}}`. On resume
    after step `resume_step` the rows of later steps are dropped, so the joined curve has each
    step once; None keeps every row. Each tracker has a thread of its own, and its failures are
    notices. Raises UserError for a tracker that is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        tensorboard: bool,
        trackers: tuple[str, ...],
        resume_step: int | None,
        config: Mapping[str, Any],
    ) -> None:
        path = run_dir / METRICS_FILE
        rewind(path, resume_step)
        starts = {}
        if tensorboard:
            starts["TensorBoard"] = trackers_of.tensorboard(run_dir, resume_step)
        for name in trackers:
            starts[name] = trackers_of.tracker(name, run_dir, resume_step or 0, config)
        self._trackers = [Background(name, start) for name, start in starts.items()]
        self._lines = LineFile(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is on its way to the disk when this returns."""
        self._lines.write(json_line(row))
        values = {escape_controls(key): value for key, value in flatten(row) if key != "step"}
        for tracker in self._trackers:
            tracker.put(values, int(row["step"]))

    def notices(self) -> list[tuple[str, str]]:
        """(tracker, what the user should know of it), since the last call."""
        return [(one.name, text) for one in self._trackers for text in one.notices()]

    def close(self, finish_s: float = FINISH_S) -> None:
        """Close the file, and give all trackers together `finish_s` seconds to send what waits."""
        self._lines.close()
        deadline = time.monotonic() + finish_s
        for tracker in self._trackers:
            tracker.finish()
        for tracker in self._trackers:
            tracker.join(deadline)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; lines that are damaged, such as one that a crash left
    half-written, and rows without a step are left out.

    Raises OSError where the file cannot be read.
    """
    return [row for row in read_json_rows(path) if _is_step(row.get("step"))]


def last_step(run_dir: Path) -> int:
    """The last step whose metrics a run has written; 0 before the first, or where none are read."""
    try:
        rows = read_rows(run_dir / METRICS_FILE)
    except OSError:
        return 0
    return int(rows[-1]["step"]) if rows else 0


def has_numbers(row: Mapping[str, Any], *names: str) -> bool:
    """Whether a row of such a file, or an event, has a finite number under each of the names."""
    values = (row.get(name) for name in names)
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of all numbers in a nested row, as `eval/<source>/loss`; nulls left out."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_STEPS


def rewind(path: Path, resume_step: int | None) -> None:
    """Drop rows after `resume_step` and broken lines; the file is replaced whole or not at all.

    None keeps every row, and a file that is not there stays so.
    """
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if resume_step is None or row["step"] <= resume_step]
    if resume_step == 0:
        kept = []
    write_file(path, "".join(json.dumps(row) + "\n" for row in kept), synced=True)
