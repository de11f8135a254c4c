"""Files that one process holds while it lives, on whichever machine it is."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from typing import IO

HELD_S = 180.0
"""For what a lost node held to be free: a file server may notice only after minutes."""
RETRY_S = 1.0


def hold(file: IO[str], patience_s: float) -> str | None:
    """Lock an open file and write into it who does; who holds it instead, for so many seconds.

    Raises OSError where the file system has no locks.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                return file.read().strip()
            time.sleep(RETRY_S)
    with suppress(OSError):  # past the buffer: what a full disk does not take must not wait there
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return None
