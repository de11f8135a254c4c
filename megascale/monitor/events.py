"""The run's diary: starts, stops, saves, skips and signals, one JSON object a line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class EventLog:
    """Appends to `events.jsonl` of a run folder; every line is flushed when written.

    The file is opened for each line: events are rare, and nothing is left to close.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "events.jsonl"

    def write(self, kind: str, **fields: Any) -> None:
        """Add one event with its UTC time; values that JSON lacks are written as text."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": kind, **fields}, default=str)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
