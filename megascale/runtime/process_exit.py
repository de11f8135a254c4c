"""The end of a process: libraries must not keep it from ending."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

EXIT_S = 10.0
"""What hooks and threads of libraries may take after the main thread has ended."""

_status = 0
_watching = threading.Lock()


def ends_with(status: int) -> None:
    """Take note of the exit status that the process is about to end with."""
    global _status
    _status = status


def bound_exit(seconds: float = EXIT_S) -> None:
    """From the end of the main thread on, let this process last so many seconds and no longer.

    Libraries that send data register functions that run at exit, and these may wait for a server
    without end. The first call of a process counts.
    """
    if _watching.acquire(blocking=False):
        watch = threading.Thread(target=_end, args=(seconds,), daemon=True, name="bound-exit")
        watch.start()


def _end(seconds: float) -> None:
    threading.main_thread().join()
    time.sleep(seconds)
    failed = getattr(sys, "last_value", None) is not None  # a traceback was printed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1 if failed else _status)
