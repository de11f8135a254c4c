"""Folders of a process that are gone with it; what a killed one left, the next removes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megascale.runtime.abandoned import held, remove_abandoned

PREFIX = ".megascale-driver-"
NAME = re.compile(re.escape(PREFIX) + r"[a-z0-9_]{8}")
SETTLED_S = 60.0
"""A folder is locked a moment after it is made; one that is younger is left alone."""


@contextmanager
def scratch_folder(parent: str | Path) -> Iterator[Path]:
    """A new folder in `parent`, for as long as this process holds it."""
    remove_abandoned(Path(parent), NAME, SETTLED_S)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as name, held(Path(name)):
        yield Path(name)
