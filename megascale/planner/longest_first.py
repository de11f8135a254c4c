"""Whole sequences, longest first, each to the least busy rank."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.errors import UserError
from megascale.planner.cost import CostModel
from megascale.planner.plan import Mode, Ring, StepPlan


def plan_longest_first(
    lengths: ArrayLike,
    num_ranks: int,
    capacity: int,
    mode: Mode,
    cost: CostModel,
    expert_group: int = 1,
) -> StepPlan:
    """Plan a step with rings of one rank (Graham's longest-processing-time rule).

    `lengths` are the tokens of each sequence. A sequence joins the first micro-batch of its
    rank with room for it (`capacity` tokens) or opens a new one, which costs `cost.fixed`.
    Every rank runs at least one micro-batch, if need be an empty one. In lockstep mode the
    ranks of each `expert_group` are padded to equal counts. The same input gives the same plan.
    Raises UserError where a sequence is longer than `capacity`.
    """
    begin = time.perf_counter()
    tokens = _checked(lengths, capacity)
    if mode != "lockstep":
        expert_group = 1
    if num_ranks < 1 or num_ranks % expert_group:
        raise ValueError(f"{num_ranks} ranks cannot form expert groups of {expert_group}")
    seconds = cost.compute_s(tokens)
    ranks = _deal(tokens, seconds, num_ranks, capacity, cost.fixed)
    for first in range(0, num_ranks, expert_group):
        _pad(ranks[first : first + expert_group])
    return StepPlan(
        num_ranks=num_ranks,
        mode=mode,
        capacity=capacity,
        predicted_s=_predict_s(ranks, seconds, expert_group, cost.fixed),
        lower_bound_s=lower_bound_s(tokens, num_ranks, capacity, cost),
        plan_s=time.perf_counter() - begin,
        rings=_rings(ranks),
        expert_group=expert_group,
    )


def lower_bound_s(lengths: ArrayLike, num_ranks: int, capacity: int, cost: CostModel) -> float:
    """Seconds that no plan of whole sequences can beat.

    The larger of all work spread evenly, micro-batches as few as capacity and ranks allow, and
    the longest sequence alone.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    seconds = cost.compute_s(tokens)
    micro_batches = max(num_ranks, -(-int(tokens.sum()) // capacity))
    even_s = (float(seconds.sum()) + cost.fixed * micro_batches) / num_ranks
    return max(even_s, cost.fixed + float(seconds.max(initial=0.0)))


def _checked(lengths: ArrayLike, capacity: int) -> NDArray[np.int64]:
    tokens = np.asarray(lengths, dtype=np.int64)
    longest, shortest = int(tokens.max(initial=0)), int(tokens.min(initial=1))
    if longest > capacity:
        raise UserError(
            f"a sequence of {longest} tokens does not fit planner.capacity_tokens = {capacity}; "
            f"set planner.capacity_tokens={longest}"
        )
    if shortest < 1:
        raise ValueError(f"a sequence has {shortest} tokens; every length must be at least 1")
    return tokens


class _Rank:
    """The micro-batches of one rank while it is being filled."""

    def __init__(self) -> None:
        self.micro_batches: list[list[int]] = []
        self._room = np.empty(4, dtype=np.int64)

    def add(self, sequence: int, tokens: int, capacity: int) -> bool:
        """Put a sequence into the first micro-batch with room; True if that is a new one."""
        used = len(self.micro_batches)
        fits = self._room[:used] >= tokens
        first = int(fits.argmax()) if used else 0
        if used and fits[first]:
            self.micro_batches[first].append(sequence)
            self._room[first] -= tokens
            return False
        if used == len(self._room):
            self._room = np.resize(self._room, 2 * used)
        self._room[used] = capacity - tokens
        self.micro_batches.append([sequence])
        return True


def _deal(
    tokens: NDArray[np.int64],
    seconds: NDArray[np.float64],
    num_ranks: int,
    capacity: int,
    fixed_s: float,
) -> list[list[list[int]]]:
    """Sequences of each micro-batch of each rank; micro-batches slowest first."""
    ranks = [_Rank() for _ in range(num_ranks)]
    busy = [(0.0, rank) for rank in range(num_ranks)]
    order = np.argsort(-tokens, kind="stable").tolist()
    tokens_list, seconds_list = tokens.tolist(), seconds.tolist()
    for sequence in order:
        busy_s, rank = busy[0]
        is_new = ranks[rank].add(sequence, tokens_list[sequence], capacity)
        busy_s += seconds_list[sequence] + (fixed_s if is_new else 0.0)
        heapq.heapreplace(busy, (busy_s, rank))
    return [_slowest_first(rank.micro_batches, seconds_list) for rank in ranks]


def _slowest_first(micro_batches: list[list[int]], seconds: list[float]) -> list[list[int]]:
    """In lockstep, ranks wait for each other least when like runs beside like."""
    return sorted(micro_batches, key=lambda batch: -sum(seconds[i] for i in batch))


def _pad(group: Sequence[list[list[int]]]) -> None:
    count = max(1, *(len(micro_batches) for micro_batches in group))
    for micro_batches in group:
        micro_batches.extend([] for _ in range(count - len(micro_batches)))


def _predict_s(
    ranks: Sequence[list[list[int]]], seconds: NDArray[np.float64], expert_group: int, fixed: float
) -> float:
    """The step's time: the slowest group, in which every micro-batch waits for its slowest."""
    seconds_list = seconds.tolist()
    slowest = 0.0
    for first in range(0, len(ranks), expert_group):
        group = zip(*ranks[first : first + expert_group], strict=True)
        total = 0.0
        for together in group:
            total += fixed + max(sum(seconds_list[i] for i in batch) for batch in together)
        slowest = max(slowest, total)
    return slowest


def _rings(ranks: Sequence[list[list[int]]]) -> tuple[Ring, ...]:
    placed = [
        (index, rank, tuple(batch))
        for rank, micro_batches in enumerate(ranks)
        for index, batch in enumerate(micro_batches)
    ]
    placed.sort(key=lambda one: one[:2])
    return tuple(
        Ring(id=id_, ranks=(rank,), sequences=sequences, offload=0.0, index=index)
        for id_, (index, rank, sequences) in enumerate(placed)
    )
