"""The planner process: takes one problem after the other and answers each; `PlansAhead` starts it.

Both directions of a private socket carry pickles: problems in; out, first `READY`, then for each
problem a pair (kind, content). Kind `PLAN`: the bytes of the plan. `USER_ERROR`: the text of a
UserError. `FAILURE`: the traceback of any other error. After a `PLAN` comes what `static_seconds`
says of the problem, apart from the plan, which then never waits for it. Both ends run code of the
same user, so pickles are safe here, and nothing between them can be damaged, so there are no
checksums.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module

from megascale.errors import UserError
from megascale.planner.problem import Planner, Problem
from megascale.planner.service.static_time import static_seconds

READY, PLAN, USER_ERROR, FAILURE = "ready", "plan", "user error", "failure"
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Those that ask a run to save and stop: it needs plans until it has."""
NICENESS = 5
"""Below the training processes, yet a quarter of a busy core."""
WATCH_PARENT_S = 1.0


def planner_path(planner: Planner) -> str:
    """Where a process of its own finds a planner, as `module:function`.

    Raises ValueError for anything but a function at the top of a module.
    """
    module, name = planner.__module__, getattr(planner, "__qualname__", "")
    if not name.isidentifier() or getattr(import_module(module), name, None) is not planner:
        raise ValueError(f"{planner} is not a function at the top of a module")
    return f"{module}:{name}"


def serve(planner_path: str, descriptor: int, parent: int) -> None:
    """Answer problems from the socket `descriptor` until it, or the process `parent`, ends."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    module, name = planner_path.split(":")
    planner: Planner = getattr(import_module(module), name)
    stream = socket.socket(fileno=descriptor).makefile("rwb")
    message: object = READY
    with suppress(EOFError, OSError):  # nobody writes or reads any more
        while True:
            pickle.dump(message, stream)
            stream.flush()
            problem: Problem = pickle.load(stream)
            kind, _ = message = _answer(planner, problem)
            if kind == PLAN:
                pickle.dump(message, stream)
                stream.flush()
                message = _static_s(planner, problem)
    os._exit(0)


def _answer(planner: Planner, problem: Problem) -> tuple[str, bytes]:
    try:
        return PLAN, planner(problem).to_bytes()
    except UserError as error:
        return USER_ERROR, str(error).encode()
    except Exception:
        return FAILURE, traceback.format_exc().encode()


def _static_s(planner: Planner, problem: Problem) -> float | None:
    """`static_seconds`; an error there is no reason to lose a plan, and goes to the log."""
    try:
        return static_seconds(problem, planner)
    except Exception:
        traceback.print_exc()
        return None


def _end_with(parent: int) -> None:
    """End this process with `parent`, also in the midst of planning.

    A fork of the parent may hold the socket open, so the end of the socket alone does not show it.
    """
    while os.getppid() == parent:
        time.sleep(WATCH_PARENT_S)
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
