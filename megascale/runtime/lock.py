"""Files that one process holds while it lives, on whichever machine it is."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megascale.reading import open_regular

RUN_LOCK = ".lock"
"""File of a run folder: held by the run that writes there."""
JOB_LOCK = ".job"
"""File of a run folder: held by the launcher that starts the run again."""
HELD_S = 180.0
"""For what a lost node held to be free: a file server may notice only after minutes."""
RETRY_S = 1.0
KERNEL_FILE = "/proc/sys/kernel/random/boot_id"
_REQUEST = "hhqqi4x"
"""`struct flock` of Linux: type, origin, start, length (0: all), process."""


@dataclass(frozen=True)
class Holding:
    """Whether a process holds a file, as far as that can be known."""

    held: bool | None = None
    """None where nobody can tell: no such file, no locks, or a free lock of another machine."""
    since: float = 0.0
    """When the last holder took it, seconds since the epoch; 0 where there is no such file."""


def hold(file: IO[str], patience_s: float) -> str | None:
    """Lock an open file and write into it who does; who holds it instead, for so many seconds.

    Raises OSError where the file system has no locks.
    """
    if not lock_within(file, patience_s):
        file.seek(0)
        return file.readline().strip()
    holder = f"process {os.getpid()} on {socket.gethostname()}\n"
    with suppress(OSError):  # some servers keep one kind of lock for both; `ask` must then know
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
        holder += _kernel()
    with suppress(OSError):  # past the buffer: what a full disk does not take must not wait there
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), holder.encode())
    return None


def lock_within(file: IO[Any], patience_s: float) -> bool:
    """Lock an open file, trying for so many seconds; whether that succeeded.

    Raises OSError where the file system has no locks.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(min(RETRY_S, max(0.01, patience_s / 10)))


def ask(path: Path) -> Holding:
    """Whether a process holds the file `path` by `hold`. Takes no lock, and so refuses nobody.

    `flock` cannot be asked without being taken. So `hold` takes a lock of the open file
    description (`fcntl_locking(2)`) too, which F_OFD_GETLK asks for. A lock that looks free is
    believed on the machine that wrote the file only, by the id of its running kernel: elsewhere
    the file system may keep locks to each machine.
    """
    try:
        with open_regular(path) as file:
            since = os.fstat(file.fileno()).st_mtime
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
            holder = file.read(1000).decode(errors="replace").split("\n")
    except OSError:
        return Holding()
    if struct.unpack(_REQUEST, answer)[0] != fcntl.F_UNLCK:
        return Holding(True, since)
    is_ours = len(holder) > 1 and holder[1] != "" and holder[1] == _kernel()
    return Holding(False if is_ours else None, since)


def _whole_file(kind: int) -> bytes:
    return struct.pack(_REQUEST, kind, os.SEEK_SET, 0, 0, 0)


def _kernel() -> str:
    """The id of the running kernel, drawn at its start; empty where it does not say."""
    try:
        return Path(KERNEL_FILE).read_text(encoding="ascii").strip()
    except OSError:
        return ""
