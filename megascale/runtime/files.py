"""Files that appear whole or not at all, and folders that no other user can plant.

Names of unfinished files are random, and such files are made exclusively. So no other process
writes to the same file, and no link that somebody has put there is followed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, BinaryIO

from megascale.reading import regular_opener

UNFINISHED = ".tmp-"
"""Begins the name of a file or folder that is being written."""
_STREAMS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))


def unfinished_file(path: Path) -> Path:
    """A hidden name beside `path` that nobody can foresee. It fits where the name of `path` is as
    long as names can be."""
    return path.parent / f"{_unfinished_prefix(path)}{secrets.token_hex(8)}"


def unfinished_names(path: Path) -> re.Pattern[str]:
    """The names that `unfinished_file` gives for `path`."""
    return re.compile(re.escape(_unfinished_prefix(path)) + "[0-9a-f]{16}")


def _unfinished_prefix(path: Path) -> str:
    return f"{UNFINISHED}{path.name[:40]}-"


@contextmanager
def whole_file(path: Path, synced: bool = False) -> Iterator[BinaryIO]:
    """A file to write that gets the name `path` when the block ends well, and else is removed.

    A link at `path` is replaced, not followed. `synced`: the content is on the disk before the
    file has its name. Raises OSError.
    """
    unfinished = unfinished_file(path)
    try:
        with open(unfinished, "xb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        is_full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or error.filename == str(unfinished):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write_file(path: Path, content: bytes | str, synced: bool = False) -> None:
    """Write a file that appears whole or not at all; see `whole_file`. Text becomes UTF-8."""
    with whole_file(path, synced) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_output(path: Path, content: str) -> None:
    """Write a file that the user has named: whole or not at all, and through a link.

    A device, a pipe or a name such as /dev/stdout takes the content as it comes. Raises OSError.
    """
    if is_stream(path) or (path.exists() and not path.is_file()):
        path.write_text(content, encoding="utf-8")
    else:
        write_file(real_path(path), content, synced=True)


def is_stream(path: Path) -> bool:
    """Whether a name stands for a device, or for what is open already, such as /dev/stdout."""
    return path.parent in _STREAMS


def real_path(path: str | Path) -> Path:
    """An absolute path without links. One that links lead round for ever stays as it is, so that
    whoever opens it says so; `Path.resolve` raises RuntimeError there."""
    return Path(os.path.realpath(path))


def broken_link(path: Path) -> str | None:
    """What is wrong with the link at which a path ends, or that it goes through; None: nothing."""
    for part in [*reversed(path.parents), path]:
        if os.path.islink(part) and not os.path.exists(part):
            try:
                os.stat(part)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return f"{part} is a link that leads back to itself"
            return f"{part} is a link to {os.readlink(part)}, which is not there"
    return None


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_lock(path: Path) -> IO[str]:
    """Open a file to lock it; made where it is missing, and kept as it is. No link is followed.

    Raises OSError.
    """
    return open(path, "a+", encoding="utf-8", opener=_open_no_link)


def open_to_append(path: Path) -> FileIO:
    """Open a regular file to add to its end, without a buffer; made where it is missing.

    Raises OSError, also for a pipe, which might let the writer wait.
    """
    return open(path, "ab", buffering=0, opener=regular_opener)


def _open_no_link(path: str, flags: int) -> int:
    return regular_opener(path, flags | os.O_NOFOLLOW)


def discard(path: Path) -> None:
    """Remove a folder with its content, a file, or a link, but nothing that a link leads to.

    What cannot be removed stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def make_fresh_folder(path: Path) -> None:
    """Make an empty folder; a folder of this user that has the name is removed first.

    Raises OSError where anything else has the name.
    """
    if os.path.lexists(path):
        require_own_folder(path)
        shutil.rmtree(path)
    path.mkdir()


def require_own_folder(path: Path) -> None:
    """Raises OSError unless `path` is a folder of this user, and no link to one."""
    about = os.lstat(path)
    if stat.S_ISLNK(about.st_mode):
        raise PermissionError(errno.EPERM, "a symbolic link where a folder must be", str(path))
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if about.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(path))


def private_folder(base: Path, *levels: str) -> Path:
    """The folder base/level/level..., made where it is missing; the levels are private.

    Every level is a folder of this user, with mode 0700. In a folder where any user may write, such
    as shared memory, the components of `base` must belong to this user or to root, or be mount
    points. Raises OSError, which names the folder, where that is not so.
    """
    base = Path(os.path.abspath(base))
    for folder in [*reversed(base.parents), base]:
        _make(folder)
        is_shared = folder.parent.stat().st_mode & stat.S_IWOTH
        if is_shared and os.lstat(folder).st_uid not in (0, os.geteuid()):
            if not os.path.ismount(folder):
                raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
    for level in levels:
        base = base / level
        _make(base)
        require_own_folder(base)
        base.chmod(0o700)
    return base


def _make(folder: Path) -> None:
    if not os.path.lexists(folder):
        with suppress(FileExistsError):  # another process makes it too
            folder.mkdir(mode=0o700)
