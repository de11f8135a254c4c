"""When each micro-batch of a plan begins and ends, by a cost model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Integers, Seconds
from megascale.planner.chunk_order import pipeline_order
from megascale.planner.cost import FORWARD_SHARE, CostModel
from megascale.planner.plan import StepPlan


@dataclass(frozen=True)
class Timeline:
    """Begin and end of each ring of a plan, in seconds from the start of the step, [rings]."""

    begin_s: Seconds
    end_s: Seconds
    busy_s: Seconds
    """Seconds that each rank computes, [ranks]."""

    @property
    def total_s(self) -> float:
        """Seconds until the last rank is done."""
        return float(self.end_s.max(initial=0.0))

    @property
    def imbalance(self) -> float:
        """Step time over mean busy time of a rank; 1 is perfect, and so is an idle step."""
        mean_s = float(self.busy_s.mean())
        return self.total_s / mean_s if mean_s > 0 else 1.0


def ring_seconds(
    plan: StepPlan, lengths: ArrayLike, cost: CostModel, slowdown: Sequence[float] = ()
) -> Seconds:
    """Seconds of each ring of `plan`, [rings]; see `Problem.slowdown`."""
    tokens = np.asarray(lengths, dtype=np.float64)
    counts = [len(ring.sequences) for ring in plan.rings]
    placed = np.fromiter((i for ring in plan.rings for i in ring.sequences), np.int64, sum(counts))
    owner = np.repeat(np.arange(len(counts)), counts)
    held = np.bincount(owner, tokens[placed], len(counts))
    squares = np.bincount(owner, tokens[placed] ** 2, len(counts))
    sizes = [len(ring.ranks) for ring in plan.rings]
    first = np.array([min(ring.ranks) for ring in plan.rings], dtype=np.int64)
    last = np.array([max(ring.ranks) for ring in plan.rings], dtype=np.int64)
    one_node = first // cost.node_size == last // cost.node_size
    seconds = cost.seconds(squares, held, sizes, one_node)
    if slowdown:
        seconds = seconds * [max(slowdown[rank] for rank in ring.ranks) for ring in plan.rings]
    return seconds


def timeline(
    plan: StepPlan, lengths: ArrayLike, cost: CostModel, slowdown: Sequence[float] = ()
) -> Timeline:
    """Run `plan` on paper.

    A ring begins when all its ranks are free. In lockstep mode the ranks of an expert group
    also wait for each other after every micro-batch. With pipeline stages these are the times
    of one stage, without filling and draining the pipeline.
    """
    ring_s = ring_seconds(plan, lengths, cost, slowdown)
    begin_s, end_s = np.zeros(len(plan.rings)), np.zeros(len(plan.rings))
    free_s, busy_s = np.zeros(plan.num_ranks), np.zeros(plan.num_ranks)
    for positions in _by_index(plan):
        if plan.mode == "lockstep":
            groups = free_s.reshape(-1, plan.expert_group)
            groups[:] = groups.max(axis=1, keepdims=True)
        ranks, starts, sizes = _members(plan, positions)
        begin_s[positions] = np.maximum.reduceat(free_s[ranks], starts)
        end_s[positions] = begin_s[positions] + ring_s[positions]
        free_s[ranks] = np.repeat(end_s[positions], sizes)
        busy_s[ranks] += np.repeat(ring_s[positions], sizes)
    return Timeline(begin_s, end_s, busy_s)


def step_s(
    plan: StepPlan,
    lengths: ArrayLike,
    cost: CostModel,
    pipeline: int = 1,
    slowdown: Sequence[float] = (),
) -> float:
    """Seconds of the step, with `pipeline` stages that each take what `cost` says.

    Stages run one forward, one backward (1F1B, as megatron-core's schedule does): stage p of P
    begins with P - p - 1 forwards. A ring's ranks run each of its forwards and backwards
    together; in lockstep mode so does an expert group.
    """
    if pipeline == 1:
        return timeline(plan, lengths, cost, slowdown).total_s
    waves = list(_by_index(plan))
    ring_s = ring_seconds(plan, lengths, cost, slowdown)
    wave_s = [np.repeat(ring_s[one], _members(plan, one)[2]) for one in waves]
    members = [_members(plan, one)[:2] for one in waves]
    free_s = np.zeros((pipeline, plan.num_ranks))
    done_s = np.zeros((2, pipeline, len(waves), plan.num_ranks))
    for stage, backward, index in one_forward_one_backward(pipeline, len(waves)):
        ranks, starts = members[index]
        begin_s = free_s[stage, ranks]
        before = stage + 1 if backward else stage - 1
        if 0 <= before < pipeline:
            begin_s = np.maximum(begin_s, done_s[int(backward), before, index, ranks])
        begin_s = _together(plan, ranks, starts, begin_s)
        share = 1 - FORWARD_SHARE if backward else FORWARD_SHARE
        free_s[stage, ranks] = begin_s + share * wave_s[index]
        done_s[int(backward), stage, index, ranks] = free_s[stage, ranks]
    return float(free_s.max(initial=0.0))


def _together(plan: StepPlan, ranks: Integers, starts: Integers, begin_s: Seconds) -> Seconds:
    """When each of `ranks` can begin, given when its ring and its expert group can."""
    sizes = np.diff(np.append(starts, len(ranks)))
    begin_s = np.repeat(np.maximum.reduceat(begin_s, starts), sizes)
    if plan.mode == "lockstep":
        of_group = np.zeros(plan.num_ranks // plan.expert_group)
        np.maximum.at(of_group, ranks // plan.expert_group, begin_s)
        begin_s = of_group[ranks // plan.expert_group]
    return begin_s


def one_forward_one_backward(pipeline: int, count: int) -> Sequence[tuple[int, bool, int]]:
    """(stage, is backward, index) of all micro-batches, in an order that respects 1F1B."""
    return pipeline_order((1,) * count, pipeline)


def _by_index(plan: StepPlan) -> Iterator[list[int]]:
    """Positions of the rings at each micro-batch index, in order; none shares a rank."""
    by_index = sorted(range(len(plan.rings)), key=lambda position: plan.rings[position].index)
    for _, positions in groupby(by_index, key=lambda position: plan.rings[position].index):
        yield list(positions)


def _members(plan: StepPlan, positions: list[int]) -> tuple[Integers, Integers, Integers]:
    """Ranks of some rings one after another, where each ring's begin, and how many they are."""
    sizes = np.array([len(plan.rings[position].ranks) for position in positions], dtype=np.int64)
    ranks = np.fromiter(
        (rank for position in positions for rank in plan.rings[position].ranks),
        np.int64,
        int(sizes.sum()),
    )
    return ranks, np.cumsum(sizes) - sizes, sizes
