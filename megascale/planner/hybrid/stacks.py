"""Plans for free mode: rings stacked on the least busy ranks, then short sequences on top.

Ranks wait for each other in rings only. Rings are laid first, largest first, while all ranks are
free at about the same time; what a rank must still wait for a ring is filled with short sequences,
and the rest of them level the ranks at the end (longest processing time first, Graham 1969).
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megascale.arrays import Floats
from megascale.planner.bound import needed_offload
from megascale.planner.plan_builder import Placed
from megascale.planner.problem import Problem
from megascale.planner.scalar_cost import Clock

WAITING = 2.0
"""How bad a second of waiting of all ranks of a ring is, beside a second of starting later."""

MOST_ROOMS = 64
"""Micro-batches of a rank that take more sequences. With no limit, the time to plan would grow with
the square of the tokens of a rank."""


@dataclass
class Stack:
    """What one rank runs."""

    free_s: float = 0.0
    """When it has run all it has."""
    batches: list[list[int]] = field(default_factory=list)
    """Sequences of its last micro-batches of one rank, those after its last ring."""
    rooms: list[tuple[int, list[int]]] = field(default_factory=list)
    """Tokens that still fit the roomiest of these, and their sequences."""

    def put(self, sequence: int, length: int, capacity: int) -> bool:
        """Add a sequence to the first of the roomiest micro-batches that takes it, else to a new
        one; whether it was a new one."""
        for place, (room, batch) in enumerate(self.rooms):
            if room >= length:
                batch.append(sequence)
                self.rooms[place] = (room - length, batch)
                return False
        self.batches.append([sequence])
        self.rooms.append((capacity - length, self.batches[-1]))
        if len(self.rooms) > MOST_ROOMS:
            del self.rooms[min(range(len(self.rooms)), key=lambda place: self.rooms[place][0])]
        return True


class Stacks:
    """The stacks of all ranks while they are being filled."""

    def __init__(self, problem: Problem, tokens: list[int]) -> None:
        self._problem, self._tokens = problem, tokens
        self._clock = Clock(problem.cost)
        self._node_size = min(problem.cost.node_size, problem.num_ranks)
        self._ranks = [Stack() for _ in range(problem.num_ranks)]
        self._slow = problem.slowdown or (1.0,) * problem.num_ranks
        self._paces = sorted(set(self._slow))
        """How slow ranks may be."""
        self._ring_s = 0.0
        """Of the rings that are stacked now."""
        self._units: list[tuple[float, int, Placed]] = []
        self._gaps: list[tuple[float, int, float]] = []

    def add_rings(self, sequences: list[int], sizes: list[int]) -> None:
        """A ring for each sequence, largest first and, of equals, longest first."""
        order = sorted(
            zip(sizes, sequences, strict=True), key=lambda one: (-one[0], -self._tokens[one[1]])
        )
        nodes: list[tuple[float, list[int], int]] = []
        last_size = 0
        free_s = np.array([one.free_s for one in self._ranks])
        slow = np.array(self._slow)
        for size, sequence in order:
            if size > self._node_size:
                self._ring_s = self._clock.ring_s(self._tokens[sequence], size, False)
                ranks = self._least_busy(free_s, slow, size)
                free_s[ranks] = self._stack(sequence, ranks)
                continue
            if size != last_size:
                self._ring_s = self._clock.ring_s(self._tokens[sequence], size, True)
                nodes, last_size = self._by_place(size), size
            _, ranks, begin = nodes[0]
            self._stack(sequence, sorted(ranks))
            heapq.heapreplace(nodes, self._place(begin, size))

    def _by_place(self, size: int) -> list[tuple[float, list[int], int]]:
        """Heap of the best places of all nodes that are large enough."""
        begins = range(0, len(self._ranks) - size + 1, self._node_size)
        heap = [self._place(begin, size) for begin in begins]
        heapq.heapify(heap)
        return heap

    def _place(self, begin: int, size: int) -> tuple[float, list[int], int]:
        """(badness, ranks, `begin`) of the best place in a node: early, and with little waiting."""
        ranks = range(begin, min(begin + self._node_size, len(self._ranks)))
        if len(self._paces) == 1:
            return (*self._among(ranks, size), begin)
        tried = []
        for pace in self._paces:
            able = [rank for rank in ranks if self._slow[rank] <= pace]
            if len(able) >= size:
                badness, chosen = self._among(able, size)
                tried.append((badness + self._drag_s(pace), chosen))
        return (*min(tried), begin)

    def _drag_s(self, pace: float) -> float:
        """How bad it is that a ring has a rank of this pace: all others wait for it."""
        return (1.0 + WAITING) * (pace - 1.0) * self._ring_s

    def _among(self, ranks: Sequence[int], size: int) -> tuple[float, list[int]]:
        """(badness, ranks) of the best `size` of some ranks of a node."""
        order = sorted((self._ranks[rank].free_s, rank) for rank in ranks)
        best, best_at = float("inf"), 0
        waited = sum(free_s for free_s, _ in order[: size - 1])
        for at in range(len(order) - size + 1):
            ready_s = order[at + size - 1][0]
            waited += ready_s
            badness = ready_s + WAITING * (ready_s - waited / size)
            waited -= order[at][0]
            if badness <= best:
                best, best_at = badness, at
        return best, [rank for _, rank in order[best_at : best_at + size]]

    def _least_busy(self, free_s: Floats, slow: Floats, size: int) -> list[int]:
        """`size` ranks that can begin together early, and of these those that wait least."""
        if len(self._paces) == 1:
            return _least_busy(free_s, size)
        tried = []
        for pace in self._paces:
            able = np.where(slow <= pace, free_s, np.inf)
            if np.isfinite(able).sum() >= size:
                ranks = _least_busy(able, size)
                tried.append((float(free_s[ranks].max()) + self._drag_s(pace), ranks))
        return min(tried)[1]

    def _stack(self, sequence: int, ranks: list[int]) -> float:
        """Add a ring; when it is done."""
        length, node_size = self._tokens[sequence], self._problem.cost.node_size
        one_node = ranks[0] // node_size == ranks[-1] // node_size
        begin_s = max(self._ranks[rank].free_s for rank in ranks)
        slow = max(self._slow[rank] for rank in ranks)
        end_s = begin_s + slow * self._clock.ring_s(length, len(ranks), one_node)
        for rank in ranks:
            stack = self._ranks[rank]
            if begin_s > stack.free_s:
                self._gaps.append((begin_s - stack.free_s, rank, stack.free_s))
            stack.free_s = end_s
        offload = needed_offload(self._problem, length, len(ranks))
        self._units.append((begin_s, len(self._units), Placed(ranks, [sequence], offload)))
        return end_s

    def fill_gaps(self, sequences: list[int]) -> list[int]:
        """Put what fits of `sequences`, longest first, into waits for rings; return the rest."""
        left = sequences[::-1]
        lengths = [self._tokens[one] for one in left]
        for gap_s, rank, begin_s in sorted(self._gaps, reverse=True):
            while left:
                batch, seconds = self._fill(gap_s / self._slow[rank], left, lengths)
                if not batch:
                    break
                seconds *= self._slow[rank]
                self._units.append((begin_s, len(self._units), Placed((rank,), batch)))
                begin_s, gap_s = begin_s + seconds, gap_s - seconds
        return left[::-1]

    def _fill(self, gap_s: float, left: list[int], lengths: list[int]) -> tuple[list[int], float]:
        """One micro-batch of at most `gap_s` seconds, always the longest that fits; its seconds."""
        batch: list[int] = []
        seconds, room = self._problem.cost.fixed, self._problem.capacity
        while left:
            longest = self._clock.tokens_in(gap_s - seconds, room)
            at = bisect.bisect_right(lengths, longest) - 1
            if at < 0:
                break
            batch.append(left.pop(at))
            length = lengths.pop(at)
            seconds, room = seconds + self._clock.alone_s(length), room - length
        return batch, seconds

    def level(self, sequences: list[int]) -> None:
        """Each of `sequences`, longest first, onto the rank that has done it first."""
        heaps: dict[float, list[tuple[float, int]]] = {pace: [] for pace in self._paces}
        for rank, stack in enumerate(self._ranks):
            heaps[self._slow[rank]].append((stack.free_s, rank))
        for heap in heaps.values():
            heapq.heapify(heap)
        capacity = self._problem.capacity
        for sequence in sequences:
            length = self._tokens[sequence]
            seconds = self._clock.alone_s(length)
            _, pace = min((heap[0][0] + pace * seconds, pace) for pace, heap in heaps.items())
            heap = heaps[pace]
            rank = heap[0][1]
            stack = self._ranks[rank]
            if stack.put(sequence, length, capacity):
                seconds += self._problem.cost.fixed
            stack.free_s += pace * seconds
            heapq.heapreplace(heap, (stack.free_s, rank))

    @property
    def seconds(self) -> float:
        """When the last rank is done."""
        return max(stack.free_s for stack in self._ranks)

    def placed(self) -> list[Placed]:
        """Micro-batches in execution order."""
        rings = [unit for _, _, unit in sorted(self._units, key=lambda unit: unit[:2])]
        tails = [
            Placed((rank,), batch)
            for rank, stack in enumerate(self._ranks)
            for batch in stack.batches
        ]
        return rings + tails


def _least_busy(free_s: Floats, size: int) -> list[int]:
    """The `size` ranks that can begin together first, and of these those that wait least."""
    ready_s = np.partition(free_s, size - 1)[size - 1]
    waiting = np.where(free_s <= ready_s, ready_s - free_s, np.inf)
    return sorted(np.argsort(waiting, kind="stable")[:size].tolist())
