"""Plans made ahead of time by a process of their own, and what happens when it fails."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from megascale.errors import UserError
from megascale.planner.plan import PlanError, StepPlan
from megascale.planner.problem import Planner, Problem
from megascale.planner.registry import PLANNERS
from megascale.planner.service.worker import (
    IGNORED_SIGNALS,
    pack_problem,
    planner_path,
    read_frame,
    write_frame,
)

START_TIMEOUT_S = 120.0
"""To start Python and import NumPy, on the slowest of file systems."""
MAX_RESTARTS = 3
RESTART_WINDOW = 1000
"""Plans within which the planner may be started again MAX_RESTARTS times."""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Planned:
    """A checked plan."""

    plan: StepPlan
    payload: bytes
    """`plan.to_bytes()`."""
    trouble: str | None = None
    """One line for the user where this is not the plan that was asked for."""


@dataclass(frozen=True)
class Failure:
    """Why there is no plan, in one line, and all that is known of it."""

    why: str
    details: str = ""


Answer = Planned | UserError | Failure


class Maker(Protocol):
    """Something that plans one problem after the other while its caller does other things."""

    def send(self, serial: int, problem: Problem) -> None:
        """Plan `problem`; returns at once."""

    def ready(self, serial: int) -> bool:
        """Whether `wait` would return at once with something other than a failure."""

    def wait(self, serial: int) -> Answer:
        """What came of a problem that was sent."""

    def forget(self, serial: int) -> None:
        """Nobody will wait for this one."""

    def close(self) -> None:
        """Stop at once."""


class PlansAhead:
    """Plans problems in a process of its own, in the order in which they are requested.

    Where that process dies, takes longer than `timeout_s` for one plan, or answers with anything
    but a plan that passes its checks, the plan in question is made by `fast_plan` instead, and a
    new process makes those that follow; after MAX_RESTARTS, `fast_plan` makes all of them.
    Threads may share an object.
    """

    def __init__(self, planner: Planner, timeout_s: float, log: Path | None = None) -> None:
        self._start: Callable[[], Maker] = lambda: ProcessMaker(planner, timeout_s, log)
        self._maker: Maker = self._start()
        self._problems: dict[int, Problem] = {}
        self._serial = 0
        self._failures: list[int] = []
        self._lock = threading.Lock()

    def request(self, problem: Problem) -> int:
        """Have `problem` planned; the number to ask for its plan with."""
        with self._lock:
            self._serial += 1
            self._problems[self._serial] = problem
            self._maker.send(self._serial, problem)
            return self._serial

    def ready(self, serial: int) -> bool:
        """Whether `result` would return at once, and without trouble."""
        return self._maker.ready(serial)

    def result(self, serial: int) -> Planned:
        """The plan of a request, waited for; to be asked for once.

        Raises UserError where the planner did: no plan exists.
        """
        answer = self._maker.wait(serial)
        with self._lock:
            problem = self._problems.pop(serial)
            if isinstance(answer, Failure):
                answer = self._recover(serial, problem, answer)
        if isinstance(answer, UserError):
            raise answer
        return answer

    def forget(self, serial: int) -> None:
        """Drop a request whose plan nobody will ask for."""
        with self._lock:
            self._problems.pop(serial, None)
            self._maker.forget(serial)

    def close(self) -> None:
        """End the process."""
        self._maker.close()

    def _recover(self, serial: int, problem: Problem, failure: Failure) -> Planned:
        logging.getLogger("megascale").warning("%s\n%s", failure.why, failure.details)
        self._maker.close()
        self._failures = [one for one in self._failures if serial - one < RESTART_WINDOW]
        self._failures.append(serial)
        restarts = len(self._failures)
        if restarts <= MAX_RESTARTS:
            self._maker = self._start()
            outlook = f"the planner is started again ({restarts} of {MAX_RESTARTS} times)"
        else:
            self._maker = ThreadMaker()
            outlook = "it is not started again, and the fast planner makes all further plans"
        for one, other in sorted(self._problems.items()):
            self._maker.send(one, other)
        name, planner = fast_planner(problem)
        plan = planner(problem)
        check_answer(plan, problem)
        trouble = f"{failure.why}; {name} made this plan instead, and {outlook}"
        return Planned(plan, plan.to_bytes(), trouble)


def fast_planner(problem: Problem) -> tuple[str, Planner]:
    """(name, planner) that is always fast: of whole sequences where each fits one rank."""
    longest = int(problem.lengths.max(initial=0))
    name = "bytescale" if longest > problem.capacity else "longest_first"
    return name, PLANNERS[name]


def check_answer(plan: StepPlan, problem: Problem) -> None:
    """Raise PlanError for a plan that breaks its rules, or that is one for another problem."""
    asked = (problem.num_ranks, problem.mode, problem.capacity, problem.expert_group)
    answered = (plan.num_ranks, plan.mode, plan.capacity, plan.expert_group)
    if (*asked, problem.stage_layers) != (*answered, plan.stage_layers):
        raise PlanError(f"a plan for {answered} where one for {asked} was asked for")
    plan.check(problem.lengths.tolist())


class ThreadMaker:
    """Plans in a thread of this process, with the fast planner."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fast-planner")
        self._answers: dict[int, Future[Answer]] = {}

    def send(self, serial: int, problem: Problem) -> None:
        """Plan `problem`; returns at once."""
        self._answers[serial] = self._thread.submit(_plan_fast, problem)

    def ready(self, serial: int) -> bool:
        """Whether `wait` would return at once."""
        return self._answers[serial].done()

    def wait(self, serial: int) -> Answer:
        """The plan, or the UserError that there is none."""
        return self._answers.pop(serial).result()

    def forget(self, serial: int) -> None:
        """Nobody will wait for this one."""
        self._answers.pop(serial).cancel()

    def close(self) -> None:
        """Drop what is not begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _plan_fast(problem: Problem) -> Answer:
    try:
        plan = fast_planner(problem)[1](problem)
    except UserError as error:
        return error
    check_answer(plan, problem)
    return Planned(plan, plan.to_bytes())


class ProcessMaker:
    """Plans in a process: `megascale.planner.service.worker`."""

    def __init__(self, planner: Planner, timeout_s: float, log: Path | None = None) -> None:
        self._timeout_s = timeout_s
        self._news = threading.Condition()
        self._problems: dict[int, Problem] = {}
        self._sent_at: dict[int, float] = {}
        self._answers: dict[int, Answer] = {}
        self._outbox: SimpleQueue[tuple[int, Problem] | None] = SimpleQueue()
        self._end: Failure | None = None
        self._started_at = time.monotonic()
        self._free_at: float | None = None
        """When it became ready or gave its last answer."""
        try:
            self._process: subprocess.Popen[bytes] | None = _start(planner, log)
        except OSError as error:
            self._process, self._end = None, Failure(f"the planner does not start ({error})")
            return
        for work in (self._talk, self._listen):
            threading.Thread(target=work, name="planner-process", daemon=True).start()

    def send(self, serial: int, problem: Problem) -> None:
        """Plan `problem`; returns at once."""
        with self._news:
            self._problems[serial], self._sent_at[serial] = problem, time.monotonic()
        self._outbox.put((serial, problem))

    def ready(self, serial: int) -> bool:
        """Whether `wait` would return at once with something other than a failure."""
        with self._news:
            return not isinstance(self._answers.get(serial, Failure("")), Failure)

    def wait(self, serial: int) -> Answer:
        """The checked plan, the UserError of the planner, or what went wrong."""
        with self._news:
            while serial not in self._answers:
                if self._end is not None:
                    return self._end
                left = self._deadline(serial) - time.monotonic()
                if left <= 0:
                    return Failure(self._too_slow())
                self._news.wait(min(left, threading.TIMEOUT_MAX))
            self._problems.pop(serial)
            self._sent_at.pop(serial)
            return self._answers.pop(serial)

    def forget(self, serial: int) -> None:
        """Nobody will wait for this one; its answer is dropped."""
        with self._news:
            for notes in (self._problems, self._sent_at, self._answers):
                notes.pop(serial, None)

    def close(self) -> None:
        """End the process; it has nothing to lose."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._outbox.put(None)

    def _deadline(self, serial: int) -> float:
        """When its plan is late; problems that came before it have time of their own."""
        if self._free_at is None:
            return self._started_at + START_TIMEOUT_S
        return max(self._free_at, self._sent_at[serial]) + self._timeout_s

    def _too_slow(self) -> str:
        if self._free_at is None:
            return f"the planner did not start within {START_TIMEOUT_S:g} s"
        return f"the planner took longer than planner.timeout_s = {self._timeout_s:g}"

    def _talk(self) -> None:
        """Send problems, in a thread because a pipe takes only so much before it is read."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError), self._process.stdin as stream:  # `_listen` tells why it ends
            while (item := self._outbox.get()) is not None:
                serial, problem = item
                fields, lengths = pack_problem(problem)
                write_frame(stream, {"serial": serial, "problem": fields}, lengths)

    def _listen(self) -> None:
        """Take answers off the pipe, read and check them, while the main thread trains."""
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as stream:
            try:
                while (frame := read_frame(stream)) is not None:
                    self._note(*frame)
                end = self._death()
            except Exception as error:  # whatever it sent instead
                end = Failure(f"the planner sent what is no plan ({error})")
            with self._news:
                self._end = self._end or end
                self._news.notify_all()

    def _note(self, head: dict[str, Any], body: bytes) -> None:
        serial = head.get("serial", 0)
        with self._news:
            problem = self._problems.get(serial)
        answer = _read_answer(head["kind"], body, problem) if problem is not None else None
        with self._news:
            if answer is not None and serial in self._problems:
                self._answers[serial] = answer
            self._free_at = time.monotonic()
            self._news.notify_all()

    def _death(self) -> Failure:
        assert self._process is not None
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return Failure("the planner closed its output")
        if status < 0:
            return Failure(f"the planner was killed by {signal.Signals(-status).name}")
        return Failure(f"the planner ended with status {status}; logs/planner.log may say why")


def _read_answer(kind: str, body: bytes, problem: Problem) -> Answer:
    if kind == "user_error":
        return UserError(body.decode())
    if kind == "failure":
        details = body.decode()
        return Failure(f"the planner failed ({details.strip().splitlines()[-1]})", details)
    try:
        plan = StepPlan.from_bytes(body)
        check_answer(plan, problem)
    except Exception as error:  # it may be anything at all
        return Failure(f"the planner made a plan that is none ({error})")
    return Planned(plan, body)


def _start(planner: Planner, log: Path | None) -> subprocess.Popen[bytes]:
    """Start the process; by exec, because a mere fork of threads that communicate is not safe."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [
        sys.executable,
        "-P",
        "-m",
        "megascale.planner.service.worker",
        planner_path(planner),
    ]
    words = open(log, "ab") if log is not None else open(os.devnull, "wb")
    # blocked here, they are blocked in the process from its first instruction on
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": paths},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        words.close()
