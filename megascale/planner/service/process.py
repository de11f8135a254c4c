"""The planner process, seen from the run: started, asked for one plan at a time, ended.

A `ProcessPoolExecutor` is not enough: its worker outlives a run that is killed, imports the script
of the run (and torch with it), and cannot be ended by public means when it hangs.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megascale.errors import UserError
from megascale.planner.problem import Planner, Problem
from megascale.planner.service.worker import FAILURE, IGNORED_SIGNALS, USER_ERROR, planner_path

START_TIMEOUT_S = 120.0
"""To start Python and import NumPy, on the slowest of file systems."""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class PlannerFailure(Exception):
    """Why there is no plan, in one line."""

    def __init__(self, why: str, details: str = "") -> None:
        super().__init__(why)
        self.details = details
        """All that is known of it."""


class PlannerProcess:
    """A process that plans one problem at a time: `megascale.planner.service.worker`."""

    def __init__(self, planner: Planner, timeout_s: float, log: Path | None = None) -> None:
        """Starts it, and returns at once. What it prints is appended to `log`."""
        self._timeout_s = timeout_s
        self._is_ready = False
        self._is_late = False
        self._owes_static = False
        """The last answer was a plan, and its `static_s` has not been read."""
        self._process: subprocess.Popen[bytes] | None = None
        self._start_error: OSError | None = None
        path = planner_path(planner)
        self._socket, theirs = socket.socketpair()
        self._stream = self._socket.makefile("rwb")
        with theirs:
            try:
                self._process = _start(path, theirs.fileno(), log)
            except OSError as error:
                self._start_error = error

    def plan(self, problem: Problem) -> bytes:
        """The bytes of the plan for `problem`; they are not checked. One thread may call this.

        It calls `static_s` before it asks for the next plan.

        Raises UserError where the planner does. Raises PlannerFailure where the planner raises
        anything else, and where the process does not start, ends, is late or sends something else.
        """
        if self._process is None:
            raise PlannerFailure(f"the planner does not start ({self._start_error})")
        if not self._is_ready:
            with self._within(START_TIMEOUT_S, f"did not start within {START_TIMEOUT_S:g} s"):
                pickle.load(self._stream)
            self._is_ready = True
        limit = f"took longer than planner.timeout_s = {self._timeout_s:g}"
        with self._within(self._timeout_s, limit):
            pickle.dump(problem, self._stream)
            self._stream.flush()
            answer: tuple[str, bytes] = pickle.load(self._stream)
            kind, content = answer
        if kind == USER_ERROR:
            raise UserError(content.decode())
        if kind == FAILURE:
            details = content.decode()
            last = details.strip().splitlines()[-1]
            raise PlannerFailure(f"the planner failed ({last})", details)
        self._owes_static = True
        return content

    def static_s(self) -> float | None:
        """What `static_seconds` says of the problem of the last plan; None where there is none.

        A process that fails at it costs no plan: the next call of `plan` raises.
        """
        if not self._owes_static:
            return None
        self._owes_static = False
        limit = f"took longer than planner.timeout_s = {self._timeout_s:g} for static's plan"
        with suppress(PlannerFailure), self._within(self._timeout_s, limit):
            seconds = pickle.load(self._stream)
            return seconds if isinstance(seconds, float) else None
        return None

    def close(self) -> None:
        """End the process; it has nothing to lose. Any thread may call this, more than once."""
        if self._process is not None:
            self._process.kill()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends `plan` where a fork has the other end
        self._socket.close()
        if self._process is not None:
            self._process.wait()

    @contextmanager
    def _within(self, limit_s: float, too_late: str) -> Iterator[None]:
        """End the process after `limit_s` seconds; raises PlannerFailure for whatever fails."""
        watchdog = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), self._end_late)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except Exception as error:  # of what is sent, it may be anything at all
            if self._is_late:
                raise PlannerFailure(f"the planner {too_late}") from None
            if isinstance(error, EOFError | OSError):
                raise PlannerFailure(self._death()) from None
            raise PlannerFailure(f"the planner sent what is no plan ({error})") from None
        finally:
            watchdog.cancel()

    def _end_late(self) -> None:
        self._is_late = True
        self.close()

    def _death(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the planner closed its output"
        if status < 0:
            return f"the planner was killed by {signal.Signals(-status).name}"
        return f"the planner ended with status {status}; logs/planner.log may say why"


def _start(path: str, descriptor: int, log: Path | None) -> subprocess.Popen[bytes]:
    """Start the process; by exec, because a mere fork of threads that communicate is not safe."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-P", "-m", "megascale.planner.service.worker"]
    command += [path, str(descriptor), str(os.getpid())]
    # blocked here, they are blocked in the process from its first instruction on
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        with open(log or os.devnull, "ab") as words:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                pass_fds=(descriptor,),
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": paths},
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
