"""Whole sequences, longest first, each to the least busy rank."""

from __future__ import annotations

import heapq
import time

import numpy as np

from megascale.errors import UserError
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import Problem


def plan_longest_first(problem: Problem) -> StepPlan:
    """Plan a step with rings of one rank (Graham's longest-processing-time rule).

    A sequence joins the first micro-batch of its rank with room for it or opens a new one, which
    costs `cost.fixed`. Raises UserError where a sequence is longer than the capacity.
    """
    began = time.perf_counter()
    longest = int(problem.lengths.max(initial=0))
    if longest > problem.capacity:
        raise UserError(
            f"a sequence of {longest} tokens does not fit planner.capacity_tokens = "
            f"{problem.capacity}, and planner.name = longest_first shares none; "
            f"set planner.capacity_tokens={longest} or planner.name=hybrid"
        )
    return complete(problem, _placed(_deal(problem)), began)


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


def _deal(problem: Problem) -> list[list[list[int]]]:
    """Sequences of each micro-batch of each rank; micro-batches slowest first."""
    ranks = [_Rank() for _ in range(problem.num_ranks)]
    busy = [(0.0, rank) for rank in range(problem.num_ranks)]
    tokens, seconds = problem.lengths.tolist(), problem.cost.compute_s(problem.lengths).tolist()
    for sequence in np.argsort(-problem.lengths, kind="stable").tolist():
        busy_s, rank = busy[0]
        is_new = ranks[rank].add(sequence, tokens[sequence], problem.capacity)
        busy_s += seconds[sequence] + (problem.cost.fixed if is_new else 0.0)
        heapq.heapreplace(busy, (busy_s, rank))
    return [_slowest_first(rank.micro_batches, seconds) for rank in ranks]


def _slowest_first(micro_batches: list[list[int]], seconds: list[float]) -> list[list[int]]:
    """In lockstep, ranks wait for each other least when like runs beside like."""
    return sorted(micro_batches, key=lambda batch: -sum(seconds[i] for i in batch))


def _placed(ranks: list[list[list[int]]]) -> list[Placed]:
    placed = [
        (index, rank, batch)
        for rank, micro_batches in enumerate(ranks)
        for index, batch in enumerate(micro_batches)
    ]
    placed.sort(key=lambda one: one[:2])
    return [Placed((rank,), batch) for _, rank, batch in placed]
