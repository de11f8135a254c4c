"""Metrics of a run: `metrics.jsonl` first, TensorBoard and other trackers beside it."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from megascale.errors import UserError
from megascale.monitor.lines import LineFile, json_line
from megascale.runtime.files import write_file
from megascale.runtime.terminal import escape_controls

METRICS_FILE = "metrics.jsonl"
PROJECT = "megascale"


class Tracker(Protocol):
    """A place beside `metrics.jsonl` that takes flat rows of numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of one step."""

    def close(self) -> None:
        """Send what is still buffered."""


class MetricsWriter:
    """Writes rows to `metrics.jsonl`, TensorBoard and the named trackers.

    A row holds `step` and numbers, or `step` and `{"eval": {source: {name: number}}}`. On resume
    after step `resume_step` the rows of later steps are dropped, so the joined curve has each
    step once; None keeps every row. Raises UserError for a tracker that is not installed.
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
        self._trackers: list[Tracker] = []
        if tensorboard:
            self._trackers.append(_TensorBoard(run_dir, resume_step))
        for name in trackers:
            self._trackers.append(TRACKERS[name](run_dir, resume_step or 0, config))
        self._lines = LineFile(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is on its way to the disk when this returns."""
        self._lines.write(json_line(row))
        values = {escape_controls(key): value for key, value in flatten(row) if key != "step"}
        for tracker in self._trackers:
            tracker.log(values, int(row["step"]))

    def close(self) -> None:
        """Close the file and the trackers."""
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a line that a crash left half-written is passed over.

    Raises OSError where the file cannot be read.
    """
    return list(_parse(path.read_bytes()))


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


def _parse(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


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


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "monitor.tensorboard = true, but tensorboard is not installed: "
                "pip install tensorboard, or set monitor.tensorboard=false"
            ) from None
        purge = None if resume_step is None else resume_step + 1
        folder = str(run_dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=purge, flush_secs=10)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One wandb run per start, grouped by run folder: wandb takes no step twice."""

    def __init__(self, run_dir: Path, start_step: int, config: Mapping[str, Any]) -> None:
        self._run = _import("wandb").init(
            project=PROJECT,
            group=run_dir.name,
            name=_run_name(run_dir, start_step),
            dir=str(run_dir),
            config=dict(config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run_dir: Path, start_step: int, config: Mapping[str, Any]) -> None:
        self._mlflow = _import("mlflow")
        self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=_run_name(run_dir, start_step))
        self._mlflow.log_dict(dict(config), "config.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, run_dir: Path, start_step: int, config: Mapping[str, Any]) -> None:
        self._trackio = _import("trackio")
        self._trackio.init(
            project=PROJECT, name=_run_name(run_dir, start_step), config=dict(config)
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def _run_name(run_dir: Path, start_step: int) -> str:
    return f"{run_dir.name} from step {start_step}" if start_step else run_dir.name


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"monitor.trackers names {name}, which is not installed: pip install {name}, "
            "or leave it out"
        ) from None
