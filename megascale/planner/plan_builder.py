"""How what a planner decides becomes a plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megascale.planner.bound import lower_bound_s
from megascale.planner.plan import StepPlan
from megascale.planner.problem import Problem
from megascale.planner.ring import Ring
from megascale.planner.timeline import step_s


class Placed(NamedTuple):
    """A micro-batch as a planner decides it, in execution order."""

    ranks: Sequence[int]
    sequences: Sequence[int]
    offload: float = 0.0


def complete(problem: Problem, placed: Sequence[Placed], began: float | None = None) -> StepPlan:
    """A plan of micro-batches given in execution order.

    `began` is the `time.perf_counter()` at which planning began; without it `plan_s` is 0.

    A micro-batch stands at the first index that is free on all its ranks. Empty micro-batches
    are added for ranks without any, in aligned and lockstep mode where a rank of a ring is behind
    the others, and in lockstep mode for ranks with fewer than others of their expert group.
    """
    rings = tuple(
        Ring(id_, tuple(one.ranks), tuple(one.sequences), one.offload, index)
        for id_, (index, one) in enumerate(with_padding(problem, placed))
    )
    return with_seconds(problem, rings, 1, began)


def with_seconds(
    problem: Problem, rings: tuple[Ring, ...], pipeline: int, began: float | None
) -> StepPlan:
    """The plan of `rings`, with its predicted seconds and its bound; see `complete`."""
    plan = StepPlan(
        num_ranks=problem.num_ranks,
        mode=problem.mode,
        capacity=problem.capacity,
        predicted_s=0.0,
        lower_bound_s=lower_bound_s(problem),
        plan_s=0.0,
        rings=rings,
        expert_group=problem.expert_group,
        stage_layers=problem.stage_layers,
        pipeline=pipeline,
    )
    predicted_s = step_s(plan, problem.lengths, problem.cost, problem.pipeline, problem.slowdown)
    plan_s = 0.0 if began is None else time.perf_counter() - began
    return replace(plan, predicted_s=predicted_s, plan_s=plan_s)


Indexed = tuple[int, Placed]


def with_padding(problem: Problem, placed: Sequence[Placed]) -> list[Indexed]:
    """(index, micro-batch) in execution order, with the empty ones that `complete` adds."""
    done: list[Indexed] = []
    counts = [0] * problem.num_ranks
    for one in placed:
        if problem.mode != "free":
            _catch_up(done, counts, one.ranks, max(counts[rank] for rank in one.ranks))
        _add(done, counts, one)
    group = problem.expert_group
    for first in range(0, problem.num_ranks, group):
        ranks = range(first, first + group)
        _catch_up(done, counts, ranks, max(1, *(counts[rank] for rank in ranks)))
    if problem.mode != "free":
        done.sort(key=lambda one: one[0])
    return done


def _catch_up(done: list[Indexed], counts: list[int], ranks: Sequence[int], index: int) -> None:
    for rank in ranks:
        while counts[rank] < index:
            _add(done, counts, Placed((rank,), ()))


def _add(done: list[Indexed], counts: list[int], one: Placed) -> None:
    index = max(counts[rank] for rank in one.ranks)
    done.append((index, one))
    for rank in one.ranks:
        counts[rank] = index + 1
