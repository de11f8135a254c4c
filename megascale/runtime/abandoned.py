"""Folders that belong to a process while it lives; what a killed one left, another removes."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megascale.runtime.files import discard, require_own_folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let `remove_abandoned` of other processes pass over a folder of this one."""
    handle = _open(folder)
    try:
        with suppress(OSError):  # NFS has no locks on folders: there nothing is removed later
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_abandoned(parent: Path, name: re.Pattern[str], settled_s: float = 0.0) -> None:
    """Remove this user's folders in `parent` that no process holds any more.

    Their whole name must match, and they must have been left alone for `settled_s`. Links stay.
    """
    for entry in parent.iterdir():
        if name.fullmatch(entry.name):
            with suppress(OSError):  # another user's, held, or gone meanwhile
                require_own_folder(entry)
                if time.time() - entry.stat().st_mtime >= settled_s:
                    _discard_unheld(entry)


def _discard_unheld(folder: Path) -> None:
    handle = _open(folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(folder)
    finally:
        os.close(handle)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
