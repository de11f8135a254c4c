"""What filling and draining a pipeline costs at least, if work could be cut at will."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from megascale.planner.bound import lower_bound_s
from megascale.planner.cost import FORWARD_SHARE
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
    area_s = lower_bound_s(replace(problem, pipeline=1))
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

    Columns are the end of the step, the seconds of `slots` slots, and the ends of all passes.
    """
    import highspy

    passes = list(one_forward_one_backward(stages, slots))
    column = {one: number for number, one in enumerate(passes, start=1 + slots)}
    rows: list[list[tuple[int, float]]] = []
    stage_end: dict[int, int] = {}
    for stage, backward, slot in passes:
        share = 1 - FORWARD_SHARE if backward else FORWARD_SHARE
        end = column[stage, backward, slot]
        before = column.get((stage + 1 if backward else stage - 1, backward, slot))
        begins = [one for one in (before, stage_end.get(stage)) if one is not None]
        for start in [[(begin, -1.0)] for begin in begins] or [[]]:
            rows.append([(end, 1.0), (1 + slot, -share), *start])
        stage_end[stage] = end
    rows += [[(0, 1.0), (end, -1.0)] for end in stage_end.values()]
    work = [(1 + slot, 1.0) for slot in range(slots)]
    total = 1 + (slots - 1) * fixed_share
    library: Any = highspy  # partly without types
    model = library.HighsLp()
    model.num_col_, model.num_row_ = 1 + slots + len(passes), len(rows) + 1
    model.col_cost_ = np.eye(1, model.num_col_)[0]
    model.col_lower_ = np.r_[0.0, np.full(slots, fixed_share), np.zeros(len(passes))]
    model.col_upper_ = np.full(model.num_col_, np.inf)
    model.row_lower_ = np.r_[np.zeros(len(rows)), total]
    model.row_upper_ = np.r_[np.full(len(rows), np.inf), total]
    entries = [*rows, work]
    model.a_matrix_.format_ = library.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *map(len, entries)])
    model.a_matrix_.index_ = np.array([one for row in entries for one, _ in row])
    model.a_matrix_.value_ = np.array([one for row in entries for _, one in row])
    solver = library.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(model)
    solver.run()
    return float(solver.getInfo().objective_function_value)
