"""When each micro-batch of a plan begins and ends, by a cost model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Integers, Seconds
from megascale.planner.chunk_order import chunks_of_waves, pipeline_generations, pipeline_order
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
    owner, begin, end = _computed(plan, lengths)
    count = len(plan.rings)
    before, held = (np.bincount(owner, tokens, count) for tokens in (begin, end - begin))
    squares = np.bincount(owner, end**2 - begin**2, count)
    sizes = [len(ring.ranks) for ring in plan.rings]
    first = np.array([min(ring.ranks) for ring in plan.rings], dtype=np.int64)
    last = np.array([max(ring.ranks) for ring in plan.rings], dtype=np.int64)
    one_node = first // cost.node_size == last // cost.node_size
    seconds = cost.seconds(squares, held, sizes, one_node, before)
    if slowdown:
        seconds = seconds * [max(slowdown[rank] for rank in ring.ranks) for ring in plan.rings]
    return seconds


def _computed(plan: StepPlan, lengths: ArrayLike) -> tuple[Integers, Seconds, Seconds]:
    """(position of the ring, begin, end) of all tokens that rings compute, sequence by sequence."""
    counts = [len(ring.sequences) for ring in plan.rings]
    placed = np.fromiter((i for ring in plan.rings for i in ring.sequences), np.int64, sum(counts))
    end = np.asarray(lengths, dtype=np.float64)[placed]
    begin = np.zeros(len(end))
    chunked = [ring.chunks > 1 for ring in plan.rings]
    if any(chunked):
        spans = [span for ring in plan.rings for span in ring.spans]
        begin_end = np.array(spans, dtype=np.float64).reshape(-1, 2)
        begin[np.repeat(chunked, counts)], end[np.repeat(chunked, counts)] = begin_end.T
    return np.repeat(np.arange(len(counts)), counts), begin, end


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
    begins with P - p - 1 forwards. Chunks run in the order of `chunk_order`. A ring's ranks run
    each of its forwards and backwards together; in lockstep mode so does an expert group.
    """
    if pipeline == 1:
        return timeline(plan, lengths, cost, slowdown).total_s
    ring_s = ring_seconds(plan, lengths, cost, slowdown)
    positions = list(_by_index(plan))
    waves = [_Wave(np.array(one), *_members(plan, one)) for one in positions]
    chunks = chunks_of_waves(plan.rings[one[0]] for one in positions)
    free_s = np.zeros(pipeline * plan.num_ranks)
    done_s = np.zeros((2, pipeline + 2, len(plan.rings)))  # stages count from 1
    for passes in pipeline_generations(tuple(chunks), pipeline):
        some = [waves[index] for _, _, index in passes]
        ring = np.concatenate([wave.rings for wave in some])
        count = [len(wave.rings) for wave in some]
        stage = np.repeat([stage for stage, _, _ in passes], count)
        backward = np.repeat([int(backward) for _, backward, _ in passes], count)
        sizes = np.concatenate([wave.sizes for wave in some])
        members = np.concatenate([wave.ranks for wave in some])
        members += np.repeat(stage, sizes) * plan.num_ranks
        starts = np.cumsum(sizes) - sizes
        begin_s = np.maximum(
            np.maximum.reduceat(free_s[members], starts),
            done_s[backward, stage + 2 * backward, ring],
        )
        if plan.mode == "lockstep":
            begin_s = _with_groups(plan.expert_group, members, starts, sizes, begin_s)
        share = np.where(backward, 1 - FORWARD_SHARE, FORWARD_SHARE)
        end_s = begin_s + share * ring_s[ring]
        done_s[backward, stage + 1, ring] = end_s
        free_s[members] = np.repeat(end_s, sizes)
    return float(free_s.max(initial=0.0))


class _Wave(NamedTuple):
    """Rings of the same index."""

    rings: Integers
    """Their positions in the plan."""
    ranks: Integers
    """The ranks of all of them."""
    starts: Integers
    sizes: Integers
    """Ranks of each."""


def _with_groups(
    size: int, members: Integers, starts: Integers, sizes: Integers, begin_s: Seconds
) -> Seconds:
    """When rings can begin whose expert groups, of `size` ranks, begin together."""
    groups, at = np.unique(members // size, return_inverse=True)
    of_group = np.zeros(len(groups))
    np.maximum.at(of_group, at, np.repeat(begin_s, sizes))
    together: Seconds = np.maximum.reduceat(of_group[at], starts)
    return together


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
