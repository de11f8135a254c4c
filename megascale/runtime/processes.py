"""What one process decides over others: who dies with whom, and who is left to be ended. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

_PARENT_DEATH_SIGNAL = 1
_CHILD_SUBREAPER = 36


def die_with_parent() -> None:
    """Let the kernel kill this process as soon as the one that started it is gone."""
    _control(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every process below this one that loses its own."""
    _control(_CHILD_SUBREAPER, 1)


def end_descendants(timeout_s: float = 30.0) -> None:
    """Kill every process below this one and wait until they are gone, for at most `timeout_s`."""
    below = psutil.Process().children(recursive=True)
    for process in below:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(below, timeout=timeout_s)


def signal_ranks(agent: int, number: signal.Signals) -> None:
    """Send a signal to the ranks that the agent with this process id has started."""
    try:
        children = psutil.Process(agent).children()
    except psutil.NoSuchProcess:
        return
    for process in children:
        if _is_rank(process):
            _send(process, number)


def _is_rank(process: psutil.Process) -> bool:
    """Whether it is one of torchrun's workers, which lead sessions of their own."""
    try:
        return os.getsid(process.pid) == int(process.pid)
    except ProcessLookupError:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _control(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
