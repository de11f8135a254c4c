"""Text files that grow by lines, also while a disk is full or a mount is gone."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from megascale.runtime.files import open_to_append
from megascale.runtime.logs import say

MOST_WAITING = 100_000


def json_line(row: Mapping[str, Any], default: Callable[[Any], Any] | None = None) -> str:
    """A row as JSON; NaN and infinities are null, because JSON has no words for them.

    `default` is that of `json.dumps`.
    """
    return json.dumps(_finite(row), allow_nan=False, default=default)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


class LineFile:
    """Appends lines to a file. A line that cannot be written waits for the next one's turn.

    Each line is on its way to the disk when `write` returns; a part of one that was written is
    ended by a line break and written again whole, so readers pass over lines that they cannot
    parse. The oldest of more than MOST_WAITING are dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._file: FileIO | None = None
        self._torn = False

    def write(self, line: str) -> None:
        """Add a line, without its line break."""
        self._waiting.append(line.encode())
        self.settle()

    def settle(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        try:
            self._catch_up()
        except OSError as error:
            if not self._torn:
                problem = f"{self._path}: {error.strerror}; what goes there waits in memory"
                say(f"warning: {problem}")
            self._torn = True
            self.close()
        return not self._waiting

    def _catch_up(self) -> None:
        if self._file is None or not _leads_to(self._path, self._file):
            self.close()
            self._file = open_to_append(self._path)
        if self._torn:
            _write_all(self._file, b"\n")
            self._torn = False
        while self._waiting:
            _write_all(self._file, self._waiting[0] + b"\n")
            self._waiting.popleft()

    def close(self) -> None:
        """Close the file; a later `write` opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


def _leads_to(path: Path, file: FileIO) -> bool:
    """Whether `path` still names the open file. Raises OSError where it names nothing."""
    named, held = os.stat(path), os.fstat(file.fileno())
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def _write_all(file: FileIO, content: bytes) -> None:
    while content:
        content = content[file.write(content) or 0 :]
