"""Plans made ahead of time by a process of their own, and what happens when it fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from megascale.planner.plan import StepPlan
from megascale.planner.problem import Planner, Problem
from megascale.planner.registry import PLANNERS, find_planner
from megascale.planner.ring import PlanError
from megascale.planner.service.process import PlannerFailure, PlannerProcess

MAX_RESTARTS = 3
RESTART_WINDOW = 1000
"""Plans within which the planner may be started again MAX_RESTARTS times."""


@dataclass(frozen=True)
class Planned:
    """A checked plan."""

    plan: StepPlan
    payload: bytes
    """`plan.to_bytes()`."""
    trouble: str | None = None
    """One line for the user where this is not the plan that was asked for."""
    static_s: Future[float | None] | None = None
    """Predicted seconds of static context parallelism, known soon after the plan; None where
    `static_seconds` has none and where the planner failed."""


class PlansAhead:
    """Plans problems in a process of its own, in the order in which they are requested.

    `fast_planner` makes a plan instead where the process dies, takes longer than `timeout_s` for
    it, or answers with anything but a plan that passes its checks. A new process makes the plans
    that follow; after MAX_RESTARTS, `fast_planner` makes them all. Threads may share an object.
    Call `close` at the end: without it, Python waits at its end for what is requested.
    """

    def __init__(self, planner: Planner | str, timeout_s: float, log: Path | None = None) -> None:
        """`planner`: a function, or a name as for `find_planner`; the process writes to `log`."""
        planner = find_planner(planner) if isinstance(planner, str) else planner
        self._start: Callable[[], PlannerProcess] = lambda: PlannerProcess(planner, timeout_s, log)
        self._process: PlannerProcess | None = self._start()
        """None once the fast planner makes all plans."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plans-ahead")
        """Speaks with the process, checks the plans and starts the process again."""
        self._plans: dict[int, tuple[Future[Planned], Future[float | None]]] = {}
        """By request: the plan, and its `static_s`."""
        self._numbers = count(1)
        self._failures: list[int] = []
        self._lock = threading.Lock()
        """Held to replace the process, and to close."""
        self._is_closed = False

    def request(self, problem: Problem) -> int:
        """Have `problem` planned; the number to ask for its plan with."""
        number = next(self._numbers)
        submit = self._thread.submit
        self._plans[number] = submit(self._plan, number, problem), submit(self._static_s)
        return number

    def ready(self, number: int) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._plans[number][0].done()

    def result(self, number: int) -> Planned:
        """The plan of a request, waited for; to be asked for once.

        Raises UserError where the planner did: no plan exists.
        """
        plan, static_s = self._plans.pop(number)
        return replace(plan.result(), static_s=static_s)

    def forget(self, number: int) -> None:
        """Drop a request whose plan nobody will ask for."""
        self._plans.pop(number)[0].cancel()  # the process sends static's seconds all the same

    def close(self) -> None:
        """End the process, and drop what is not planned."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.close()
        self._thread.shutdown(cancel_futures=True)

    def _plan(self, number: int, problem: Problem) -> Planned:
        if self._process is None:
            return _plan_fast(problem)
        try:
            return _read_plan(self._process.plan(problem), problem)
        except PlannerFailure as failure:
            outlook = self._replace_process(number, failure)
            name, _ = fast_planner(problem)
            trouble = f"{failure}; {name} made this plan instead, and {outlook}"
            return replace(_plan_fast(problem), trouble=trouble)

    def _static_s(self) -> float | None:
        """Of the plan before, in the order of the thread."""
        return None if self._process is None else self._process.static_s()

    def _replace_process(self, number: int, failure: PlannerFailure) -> str:
        """Start the process again, or never again; says which."""
        with self._lock:
            if self._is_closed or self._process is None:
                raise CancelledError
            logging.getLogger("megascale").warning("%s\n%s", failure, failure.details)
            self._process.close()
            self._failures = [at for at in self._failures if number - at < RESTART_WINDOW]
            self._failures.append(number)
            restarts = len(self._failures)
            if restarts <= MAX_RESTARTS:
                self._process = self._start()
                return f"the planner is started again ({restarts} of {MAX_RESTARTS} times)"
            self._process = None
            return "it is not started again, and the fast planner makes all further plans"


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
    if plan.pipeline > problem.pipeline:
        raise PlanError(f"a plan for {plan.pipeline} stages where there are {problem.pipeline}")
    plan.check(problem.lengths.tolist())


def _read_plan(payload: bytes, problem: Problem) -> Planned:
    try:
        plan = StepPlan.from_bytes(payload)
        check_answer(plan, problem)
    except Exception as error:  # it may be anything at all
        raise PlannerFailure(f"the planner made no plan of this batch ({error})") from None
    return Planned(plan, payload)


def _plan_fast(problem: Problem) -> Planned:
    plan = fast_planner(problem)[1](problem)
    check_answer(plan, problem)
    return Planned(plan, plan.to_bytes())
