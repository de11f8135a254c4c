"""Planners that a planner process finds by name, for tests: slow ones, and ones that fail."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace

from megascale.errors import UserError
from megascale.planner import Problem, StepPlan, plan_longest_first

TROUBLE = 7
"""The number of sequences that a planner below has trouble with; with others it has none."""

_planned: list[Problem] = []


def plan_slowly(problem: Problem) -> StepPlan:
    """In 50 ms, as a solver might."""
    time.sleep(0.05)
    return plan_longest_first(problem)


def plan_loudly(problem: Problem) -> StepPlan:
    """With words on stdout, as solvers have them."""
    os.write(1, b"Solver 1.0\n" * 100)
    print("optimal")
    return plan_longest_first(problem)


def plan_aloud(problem: Problem) -> StepPlan:
    """With the problem on stdout."""
    print(problem, problem.lengths.dtype, flush=True)
    return plan_longest_first(problem)


def plan_or_hang(problem: Problem) -> StepPlan:
    """Forever."""
    if len(problem.lengths) == TROUBLE:
        time.sleep(1000)
    return plan_longest_first(problem)


def plan_or_die(problem: Problem) -> StepPlan:
    """In the midst of it."""
    if len(problem.lengths) == TROUBLE:
        os.kill(os.getpid(), signal.SIGKILL)
    return plan_longest_first(problem)


def plan_or_raise(problem: Problem) -> StepPlan:
    """With a mistake."""
    if len(problem.lengths) == TROUBLE:
        raise ZeroDivisionError("a mistake")
    return plan_longest_first(problem)


def plan_or_lose(problem: Problem) -> StepPlan:
    """Without the last ring, so that a sequence is not placed."""
    plan = plan_longest_first(problem)
    return replace(plan, rings=plan.rings[:-1]) if len(problem.lengths) == TROUBLE else plan


def plan_or_mistake(problem: Problem) -> StepPlan:
    """A good plan for other ranks."""
    more = problem.num_ranks + (len(problem.lengths) == TROUBLE)
    return plan_longest_first(replace(problem, num_ranks=more))


def plan_or_babble(problem: Problem) -> StepPlan:
    """After bytes that are no answer, on every file that is open."""
    if len(problem.lengths) == TROUBLE:
        for file in map(int, os.listdir("/proc/self/fd")):
            try:
                os.write(file, b"\0 something that is no answer" * 3)
            except OSError:  # of one that is for reading
                continue
        time.sleep(1000)
    return plan_longest_first(problem)


def plan_or_refuse(problem: Problem) -> StepPlan:
    """Because of what the user wants."""
    if len(problem.lengths) == TROUBLE:
        raise UserError("a sequence does not fit; set planner.capacity_tokens=9")
    return plan_longest_first(problem)


def plan_and_spoil_static(problem: Problem) -> StepPlan:
    """Well, but the process dies over what comes after the plan."""
    if len(problem.lengths) == TROUBLE:
        worker = sys.modules["__main__"]
        worker.static_seconds = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return plan_longest_first(problem)


def plan_four_times(problem: Problem) -> StepPlan:
    """In one process."""
    _planned.append(problem)
    if len(_planned) > 4:
        raise UserError("no fifth plan; ask for four")
    return plan_longest_first(problem)


def plan_on_and_on(problem: Problem) -> StepPlan:
    """Busily, without an end."""
    while True:
        problem.lengths.sum()
