"""Dynamic Hybrid Parallelism (DHP, arXiv 2602.21788), written from the paper: rings of any size.

Sequences are packed best fit decreasing by memory. Then the ranks are shared out, so that the
slowest pack of a round takes least time. The paper does the second part by dynamic programming over
packs and ranks. `share_ranks` finds the same optimum, and is fast for 10,000 ranks. The paper plans
one round of packs. Batches that do not fit in one are planned in as few rounds as memory allows,
packs of like time together.

A run names this planner as `module:function`. It runs at least as many micro-batches as a pipeline
has stages, if there are sequences for it.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Floats
from megascale.planner.peers.ring_sizes import offload_to_fit
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import Problem


@dataclass
class Pack:
    """Sequences that DHP computes together."""

    room: int
    """Tokens that still fit on its least ranks."""
    least: int
    """Ranks that hold it."""
    sequences: list[int] = field(default_factory=list)
    squares: float = 0.0
    tokens: int = 0

    def add(self, sequence: int, length: int) -> None:
        """Put a sequence in, whether it fits or not."""
        self.sequences.append(sequence)
        self.squares += float(length) ** 2
        self.tokens += length
        self.room -= length


def plan_dhp(problem: Problem) -> StepPlan:
    """DHP's two parts: packs by memory, then ranks by time.

    Raises UserError where a sequence is too long for all ranks.
    """
    began = time.perf_counter()
    problem.require_fit()
    packs = _packs_by_memory(problem)
    packs.sort(key=lambda pack: (-pack.least, -float(_seconds(problem, pack, pack.least))))
    placed = []
    for begin, end in _rounds(problem, [pack.least for pack in packs]):
        row = packs[begin:end]
        sizes = share_ranks(problem, row)
        at = 0
        for pack, size in sorted(zip(row, sizes, strict=True), key=lambda one: -one[1]):
            held = size * problem.capacity
            offload = offload_to_fit(pack.tokens, held, problem.stage_layers)
            placed.append(Placed(range(at, at + size), pack.sequences, min(1.0, float(offload))))
            at += size
    return complete(problem, placed, began)


def _packs_by_memory(problem: Problem) -> list[Pack]:
    """Best fit decreasing: a sequence joins the pack with the least room that it fits in."""
    lengths, total = problem.lengths.tolist(), int(problem.lengths.sum())
    even = -(-total // (problem.num_ranks * problem.pipeline))  # so that a pipeline has its packs
    capacity = problem.capacity if problem.pipeline == 1 else min(problem.capacity, even)
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []
    for sequence in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        length = lengths[sequence]
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            number = rooms.pop(place)[1]
        else:
            number, least = len(packs), min(-(-length // problem.capacity), problem.num_ranks)
            room = capacity if least == 1 else least * problem.capacity
            packs.append(Pack(max(room, length), max(1, least)))
        packs[number].add(sequence, length)
        insort(rooms, (packs[number].room, number))
    return packs


def _rounds(problem: Problem, least: Sequence[int]) -> list[tuple[int, int]]:
    """Begin and end of each round: packs in a row whose least ranks fit on all ranks."""
    ends, ranks = [0], 0
    for number, size in enumerate(least):
        if ranks + size > problem.num_ranks:
            ends.append(number)
            ranks = 0
        ranks += size
    ends.append(len(least))
    return [(begin, end) for begin, end in zip(ends, ends[1:], strict=False) if begin < end]


def _seconds(problem: Problem, pack: Pack, sizes: ArrayLike) -> Floats:
    """Of a pack on each number of ranks, on one node where they fit on one."""
    cost = problem.cost
    in_node = np.asarray(sizes) <= cost.node_size
    return cost.seconds(pack.squares, pack.tokens, sizes, in_node)


def share_ranks(problem: Problem, packs: Sequence[Pack]) -> list[int]:
    """Ranks of each pack, at least its least and together at most all, for the least time.

    The slowest pack gets ranks, as few as make it faster, as long as there are so many.
    """
    sizes = [pack.least for pack in packs]
    left = problem.num_ranks - sum(sizes)
    heap = [
        (-float(_seconds(problem, pack, pack.least)), number) for number, pack in enumerate(packs)
    ]
    heapq.heapify(heap)
    while left:
        slowest_s, number = -heap[0][0], heap[0][1]
        seconds = _seconds(problem, packs[number], sizes[number] + np.arange(1, left + 1))
        faster = np.flatnonzero(seconds < slowest_s)
        if not len(faster):
            break
        more = int(faster[0]) + 1
        sizes[number] += more
        left -= more
        heapq.heapreplace(heap, (-float(seconds[more - 1]), number))
    return sizes
