"""What filling and draining a pipeline costs at least, if work could be cut at will."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from megascale.arrays import Integers
from megascale.planner.bound import chunked_memory, lower_bound_s
from megascale.planner.cost import FORWARD_SHARE
from megascale.planner.linear_program import Rows, linear_program, quiet_solver
from megascale.planner.problem import Problem
from megascale.planner.timeline import one_forward_one_backward

MOST_STAGES, MOST_SLOTS = 8, 128
"""Beyond them the linear program takes ten seconds and more."""
STEP = 1.2
"""Between the numbers of micro-batches that are compared; the time is flat near the best one."""
DIGITS = 3
"""Of the fixed share that factors are computed for."""


def fill_bound_s(problem: Problem) -> float:
    """Seconds that 1F1B takes if the work of every rank could be cut into micro-batches at will.

    A reference for plans with pipeline stages, and no bound: a plan that cuts sequences into
    chunks, whose backward passes run in reverse, may be faster. Without pipeline stages, and with
    more than 8 of them, it is `lower_bound_s`.
    """
    bound_s = lower_bound_s(problem)
    if problem.pipeline == 1 or problem.pipeline > MOST_STAGES:
        return bound_s
    area_s = lower_bound_s(replace(chunked_memory(problem), pipeline=1))
    share = problem.cost.fixed / area_s if area_s else 1.0
    return max(bound_s, area_s * fill_factor(problem.pipeline, share))


def fill_factor(stages: int, fixed_share: float) -> float:
    """Least time of 1F1B over the time of a stage's work, of which each micro-batch adds
    `fixed_share`.

    The work counts one micro-batch; each one beyond it adds to the time.
    """
    return _fill_factor(stages, float(f"{min(fixed_share, 1.0):.{DIGITS - 1}e}"))


@lru_cache(maxsize=256)
def _fill_factor(stages: int, fixed_share: float) -> float:
    """The least over numbers of micro-batches. The time falls, and then rises, with them."""
    slots = min(MOST_SLOTS, max(1, round(0.7 * math.sqrt(stages / fixed_share))))
    best = _least_s(stages, slots, fixed_share)
    for towards in (STEP, 1 / STEP):
        at = slots
        while True:
            at = max(at + 1, round(at * towards)) if towards > 1 else int(at * towards)
            if not 1 <= at <= MOST_SLOTS:
                break
            factor = _least_s(stages, at, fixed_share)
            if factor >= best:
                break
            best = factor
    return best


def _least_s(stages: int, slots: int, fixed_share: float) -> float:
    """The linear program: seconds of each slot, and when each pass ends, for the least total.

    Columns are the end of the step, the seconds of `slots` slots, and the ends of all passes. A
    pass begins after the same slot's pass on the stage before it, and after the pass before it on
    its own stage.
    """
    passes = one_forward_one_backward(stages, slots)
    count, (later, earlier) = len(passes), _follows(passes)
    share = np.array(
        [1 - FORWARD_SHARE if backward else FORWARD_SHARE for _, backward, _ in passes]
    )
    slot_column = 1 + np.array([slot for _, _, slot in passes])
    end_column = 1 + slots + np.arange(count)
    rows, row, edge, one = Rows(), np.arange(count), np.arange(len(later)), np.ones(len(later))
    lasts = (row, end_column, np.ones(count)), (row, slot_column, -share)
    follows = (edge, end_column[later], one), (edge, slot_column[later], -share[later])
    begin = (edge, end_column[earlier], -one)
    rows.add(count, 0.0, np.inf, *lasts)
    rows.add(len(later), 0.0, np.inf, *follows, begin)
    rows.add(count, 0.0, np.inf, (row, 0 * row, np.ones(count)), (row, end_column, -np.ones(count)))
    total, slot = 1 + (slots - 1) * fixed_share, np.arange(slots)
    rows.add(1, total, total, (0 * slot, 1 + slot, np.ones(slots)))
    lower = np.concatenate([[0.0], np.full(slots, fixed_share), np.zeros(count)])
    solver = quiet_solver()
    solver.passModel(linear_program(rows, lower, np.full(len(lower), np.inf)))
    solver.run()
    return float(solver.getInfo().objective_function_value)


def _follows(passes: Sequence[tuple[int, int, int]]) -> Integers:
    """(later, earlier) passes of which one waits for the other, [2, pairs]."""
    number = {one: at for at, one in enumerate(passes)}
    pairs: list[tuple[int, int]] = []
    last: dict[int, int] = {}
    for at, (stage, backward, slot) in enumerate(passes):
        before = number.get((stage + 1 if backward else stage - 1, backward, slot))
        pairs += [(at, earlier) for earlier in (before, last.get(stage)) if earlier is not None]
        last[stage] = at
    return np.array(pairs, dtype=np.int64).T
