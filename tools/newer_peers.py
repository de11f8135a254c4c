"""Planners of 2025 and 2026, written from their papers, behind the same interface.

`wlb_llm`: the packing of WLB-LLM (OSDI 2025, arXiv 2503.17924) on rings of one size. WLB-LLM also
delays outliers to later steps, which changes the batches of a run, so it is left out: every
sequence is placed in its step.

`dhp`: Dynamic Hybrid Parallelism (arXiv 2602.21788): rings of any size. Sequences are packed best
fit decreasing by memory; then the ranks are shared out, so that the slowest pack of a round takes
least time. The paper does the second part by dynamic programming over packs and ranks.
`share_ranks` finds the same optimum where a larger ring is never slower, and is fast for 10,000
ranks. The paper plans one round of packs for a cluster; batches that do not fit in one are planned
in as few rounds as memory allows, packs of like time together, so that a round wastes little.

Both run at least as many micro-batches as a pipeline has stages, if there are sequences for it.
FCP (arXiv 2605.08524) is not here: it places blocks of a sequence on any ranks, in any amounts, and
is no plan of rings.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Floats
from megascale.planner import Placed, Problem, StepPlan, complete
from megascale.planner.peers.ring_sizes import offload_to_fit
from megascale.planner.peers.static import place_groups, static_sizes


def plan_wlb_llm(problem: Problem) -> StepPlan:
    """WLB-LLM's packing on the smallest rings that hold the longest sequence.

    Raises UserError where a sequence is too long for all ranks.
    """
    began = time.perf_counter()
    size = static_sizes(problem)[0]
    groups = problem.num_ranks // size
    room = max(size * problem.capacity, int(problem.lengths.max(initial=1)))
    each = max(-(-int(problem.lengths.sum()) // (groups * room)), 1)
    stages = min(problem.pipeline, -(-len(problem.lengths) // groups))
    each = max(each, stages)
    while (packs := _balanced_packs(problem, groups * each, room)) is None:
        each += 1
    seconds = [problem.cost.compute_s(problem.lengths[pack]).sum() for pack in packs]
    order = sorted(range(len(packs)), key=lambda one: -seconds[one])
    dealt: list[list[list[int]]] = [[] for _ in range(groups)]
    for turn in range(each):  # in turns back and forth, so that groups differ little
        row = order[turn * groups : (turn + 1) * groups]
        for group, one in enumerate(row if turn % 2 == 0 else reversed(row)):
            dealt[group].append(packs[one])
    return complete(problem, place_groups(problem, size, dealt), began)


def _balanced_packs(problem: Problem, number: int, room: int) -> list[list[int]] | None:
    """The longest sequence first, each to the pack of least work, or to the shortest pack if that
    has no room; None where a sequence fits in neither (WLB-LLM would delay it)."""
    lengths = problem.lengths.tolist()
    seconds = problem.cost.compute_s(problem.lengths).tolist()
    packs: list[list[int]] = [[] for _ in range(number)]
    work, tokens = [0.0] * number, [0] * number
    by_work = [(0.0, pack) for pack in range(number)]
    by_tokens = [(0, pack) for pack in range(number)]
    for sequence in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        pack = _least(by_work, work)
        if tokens[pack] + lengths[sequence] > room:
            pack = _least(by_tokens, tokens)
            if tokens[pack] + lengths[sequence] > room:
                return None
        packs[pack].append(sequence)
        work[pack] += seconds[sequence]
        tokens[pack] += lengths[sequence]
        heapq.heappush(by_work, (work[pack], pack))
        heapq.heappush(by_tokens, (tokens[pack], pack))
    return packs


def _least(heap: list[tuple[Any, int]], now: list[Any]) -> int:
    """The pack of the least value; entries of a heap that have changed since are dropped."""
    while heap[0][0] != now[heap[0][1]]:
        heapq.heappop(heap)
    return heap[0][1]


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
