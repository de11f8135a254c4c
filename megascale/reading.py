"""Files that anybody may have put there: opened where they are regular files, read within bounds.

A named pipe would let its reader wait for ever, and a device may have no end. Neither is a file of
a run, a corpus or a model.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

MOST_TEXT_BYTES = 1 << 28
"""Of a text that is read whole, such as a list of lengths."""
MOST_FILE_BYTES = 1 << 32
"""Of another file that is read whole, such as a tokenizer."""
_CHUNK_BYTES = 1 << 20
_STREAMS = (Path("/dev/fd"), Path("/proc/self/fd"))
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path, or_stream: bool = False) -> BufferedReader:
    """Open a regular file to read; never waits for another process.

    `or_stream`: also what a shell hands over, /dev/stdin and the /dev/fd/N of `<(...)`. Raises
    OSError, with the path, for what cannot be opened and for all else.
    """
    if or_stream and _is_stream(Path(path)):
        return open(path, "rb")
    return os.fdopen(regular_handle(path), "rb")


def regular_handle(path: str | Path) -> int:
    """The descriptor of a regular file that is open to read; raises OSError as `open_regular`."""
    require_regular(path)  # first, since to open a device may already do something
    return regular_opener(str(path), os.O_RDONLY | os.O_NOCTTY)


def regular_opener(path: str, flags: int) -> int:
    """An `opener` for `open`: never waits for another process, and raises OSError, with the path,
    for what is not a regular file."""
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    try:
        require_regular(path, handle)
    except OSError:
        os.close(handle)
        raise
    return handle


def require_regular(path: str | Path, handle: int | None = None) -> None:
    """Raise OSError, with the path, unless it is a regular file or a link to one.

    `handle` is its open descriptor, where there is one.
    """
    mode = os.stat(path if handle is None else handle).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"{kind} where a regular file must be", str(path))


def read_whole(path: str | Path, most_bytes: int, or_stream: bool = False) -> bytes:
    """The content of a file that `open_regular` opens.

    Raises OSError as it does, and for more than `most_bytes`.
    """
    with open_regular(path, or_stream) as file:
        content = read_bounded(file, most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"holds more than {most_bytes:,} bytes", str(path))
    return content


def read_bounded(file: BinaryIO, most_bytes: int) -> bytes:
    """What a file holds, `most_bytes` at most; memory grows with what it holds, as for a device."""
    parts = []
    while most_bytes > 0 and (part := file.read(min(most_bytes, _CHUNK_BYTES))):
        parts.append(part)
        most_bytes -= len(part)
    return b"".join(parts)


def _is_stream(path: Path) -> bool:
    return path == Path("/dev/stdin") or path.parent in _STREAMS
