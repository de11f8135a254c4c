"""Folders of a process that are gone with it; what a killed one left, the next removes."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".megascale-driver-"
NAME = re.compile(re.escape(PREFIX) + r"[a-z0-9_]{8}")
SETTLED_S = 60.0
"""A folder is locked a moment after it is made; one that is younger is left alone."""


@contextmanager
def scratch_folder(parent: str | Path) -> Iterator[Path]:
    """A new folder in `parent`, for as long as this process holds it."""
    _remove_abandoned(Path(parent))
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as name:
        lock = os.open(name, os.O_RDONLY)
        try:
            with suppress(OSError):  # NFS has no locks on folders: there nothing is removed later
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's folders that no process holds any more."""
    for entry in os.scandir(parent):
        with suppress(OSError):
            about = entry.stat(follow_symlinks=False)
            is_ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
            if not NAME.fullmatch(entry.name) or not is_ours:
                continue
            if time.time() - about.st_mtime < SETTLED_S:
                continue
            lock = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path)
            finally:
                os.close(lock)
