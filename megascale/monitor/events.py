"""The run's diary: starts, stops, saves, skips and signals, one JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megascale.monitor.lines import LineFile, json_line
from megascale.parsing import read_json_rows

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends to `events.jsonl` of a run folder, line by line."""

    def __init__(self, run_dir: Path) -> None:
        self._lines = LineFile(run_dir / EVENTS_FILE)

    def write(self, kind: str, **fields: Any) -> None:
        """Add one event with its UTC time; NaN is null, what else JSON lacks is text."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.write(json_line({"time": now, "event": kind, **fields}, default=str))

    def settle(self) -> bool:
        """Write what could not be written before; whether nothing waits any more."""
        return self._lines.settle()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run folder, oldest first, without lines that are damaged, such as one that a
    crash left half-written.

    Empty where there are none yet. Raises OSError where the file is there and cannot be read.
    """
    try:
        return [event for event in read_json_rows(run_dir / EVENTS_FILE) if _is_event(event)]
    except FileNotFoundError:
        return []


def at(event: Mapping[str, Any]) -> float:
    """When an event was written, seconds since the epoch."""
    return datetime.fromisoformat(event["time"]).timestamp()


def _is_event(event: Mapping[str, Any]) -> bool:
    """Whether it has a name and a time."""
    try:
        at(event)
    except (ValueError, TypeError, KeyError, OverflowError):
        return False
    return isinstance(event.get("event"), str)
