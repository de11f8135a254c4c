"""Plans in waves: every rank runs its k-th micro-batch at the same time as all others do.

All waves but those of giants are made equally long, so a plan is bin packing: W waves of N ranks
are W * N equal bins of time and memory, a ring takes as many bins of one wave as it has ranks, and
short sequences fill what is left of all of them.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.planner.bound import alone_s, fewest_ranks, needed_offload, smallest_sizes
from megascale.planner.clock import Clock, Rates
from megascale.planner.problem import Placed, Problem

Integers = NDArray[np.int64]

LEVEL_PRECISION = 1.003
"""How exactly the length of even waves is found."""
BEST_FIT_TRIES = 64
"""Micro-batches looked at for one with enough memory, of those with enough time."""


class Bin:
    """One micro-batch while it is being filled."""

    __slots__ = (
        "_attention_s",
        "_rates",
        "_tokens",
        "offload",
        "ranks",
        "room",
        "seconds",
        "sequences",
        "size",
        "wave",
    )

    def __init__(self, wave: int, ranks: tuple[int, ...], room: float, rates: Rates) -> None:
        self.wave, self.ranks, self.size, self.room = wave, ranks, len(ranks), room
        self.sequences: list[int] = []
        self.offload = 0.0
        self.seconds = rates.start_s
        self._rates = rates
        self._attention_s = 0.0
        self._tokens = 0

    def put(self, sequence: int, length: int, attention_s: float) -> None:
        """Add a sequence of `length` tokens, whose attention takes so long on one rank."""
        self.sequences.append(sequence)
        self.room -= length
        self._attention_s += attention_s
        self._tokens += length
        self.seconds = self._seconds(self._tokens, self._attention_s)

    def takes(self, length: int, attention_s: float, limit_s: float) -> bool:
        """Whether a sequence fits in memory and in `limit_s`."""
        if self.room < length:
            return False
        return self._seconds(self._tokens + length, self._attention_s + attention_s) <= limit_s

    def spare_s(self, limit_s: float) -> float:
        """Seconds of work on one rank that fit until `limit_s`; a little less for rings."""
        return (limit_s - self.seconds) * self.size

    def _seconds(self, tokens: int, attention_s: float) -> float:
        start_s, rate, passing = self._rates
        passing_s = passing * tokens
        shared_s = attention_s if attention_s > passing_s else passing_s
        return start_s + (rate * tokens + shared_s) / self.size


@dataclass
class Waves:
    """A plan in waves."""

    bins: list[Bin]
    seconds: list[float]
    """Of each wave."""

    def placed(self) -> list[Placed]:
        """Micro-batches in execution order, waves longest first."""
        order = sorted(range(len(self.seconds)), key=lambda wave: -self.seconds[wave])
        place = {wave: position for position, wave in enumerate(order)}
        bins = sorted(self.bins, key=lambda one: (place[one.wave], one.ranks[0]))
        return [Placed(one.ranks, one.sequences, one.offload) for one in bins if one.sequences]


class FreeRanks:
    """Ranks of each wave that no ring has taken yet, counted by node."""

    def __init__(self, num_waves: int, num_ranks: int, node_size: int) -> None:
        self._node_size = node_size
        self._sizes = np.full(-(-num_ranks // node_size), node_size, dtype=np.int64)
        self._sizes[-1] = num_ranks - (len(self._sizes) - 1) * node_size
        self._free = np.tile(self._sizes, (num_waves, 1))
        self._by_free: list[list[tuple[int, int]]] | None = None

    def take_across(self, size: int) -> tuple[int, tuple[int, ...]] | None:
        """(wave, ranks) for a ring that spans nodes: of the fullest wave with room for it.

        Whole nodes are taken first, so that what is left serves rings within a node. To be
        called before `take_within`, or where that found nothing.
        """
        totals = self._free.sum(axis=1)
        waves = np.flatnonzero(totals >= size)
        if not len(waves):
            return None
        wave = int(waves[totals[waves].argmin()])
        ranks: list[int] = []
        free = self._free[wave]
        for node in np.argsort(-free, kind="stable").tolist():
            if size - len(ranks) < free[node]:
                break
            ranks += self._cut(wave, node, int(free[node]))
        if len(ranks) < size:
            fits = np.where(free >= size - len(ranks), free, self._node_size + 1)
            ranks += self._cut(wave, int(fits.argmin()), size - len(ranks))
        self._by_free = None
        return wave, tuple(ranks)

    def take_within(self, size: int) -> tuple[int, tuple[int, ...]] | None:
        """(wave, ranks) for a ring within one node, the fullest that has room for it."""
        if self._by_free is None:
            self._by_free = [[] for _ in range(self._node_size + 1)]
            for wave, node in np.argwhere(self._free > 0)[::-1].tolist():
                self._by_free[self._free[wave, node]].append((wave, node))
        for nodes in self._by_free[size:]:
            if nodes:
                wave, node = nodes.pop()
                ranks = self._cut(wave, node, size)
                self._by_free[self._free[wave, node]].append((wave, node))
                return wave, tuple(ranks)
        return None

    def rest(self) -> list[tuple[int, int]]:
        """(wave, rank) of all that is left."""
        left = []
        for wave, node in np.argwhere(self._free > 0).tolist():
            end = node * self._node_size + int(self._sizes[node])
            left += [(wave, rank) for rank in range(end - int(self._free[wave, node]), end)]
        return left

    def _cut(self, wave: int, node: int, size: int) -> list[int]:
        begin = node * self._node_size + int(self._sizes[node] - self._free[wave, node])
        self._free[wave, node] -= size
        return list(range(begin, begin + size))


class Sheet:
    """The waves of one plan while they are being filled."""

    def __init__(self, problem: Problem, tokens: list[int], num_waves: int) -> None:
        self._problem, self._tokens = problem, tokens
        self._clock, self._a = Clock(problem.cost), problem.cost.a
        self._node_size = problem.cost.node_size
        self._free = FreeRanks(num_waves, problem.num_ranks, self._node_size)
        self._num_waves = num_waves
        self.bins: list[Bin] = []

    def add_rings(self, sequences: list[int], sizes: list[int]) -> bool:
        """Give each sequence, largest ring first, a ring of its own; False if one has no room."""
        order = sorted(zip(sizes, sequences, strict=True), key=lambda one: (-one[0], one[1]))
        for size, sequence in order:
            taken = self._free.take_within(size) if size <= self._node_size else None
            taken = taken or self._free.take_across(size)
            if taken is None:
                return False
            self._open(*taken, sequence)
        return True

    def open_rest(self) -> None:
        """Open a micro-batch on every rank of every wave that has none."""
        for wave, rank in self._free.rest():
            self._open(wave, (rank,))

    def _open(self, wave: int, ranks: tuple[int, ...], sequence: int | None = None) -> Bin:
        one_node = ranks[0] // self._node_size == ranks[-1] // self._node_size
        rates = self._clock.rates(len(ranks), one_node)
        one = Bin(wave, ranks, self._problem.capacity * len(ranks), rates)
        if sequence is not None:
            length = self._tokens[sequence]
            one.offload = needed_offload(self._problem, length, one.size)
            one.put(sequence, length, self._a * length * length)
        self.bins.append(one)
        return one

    def level(self, sequences: list[int]) -> bool:
        """Each of `sequences`, longest first, into the micro-batch that ends first and has room.

        False where none has.
        """
        bins, a = self.bins, self._a
        ready = [(one.seconds, position) for position, one in enumerate(bins)]
        heapq.heapify(ready)
        full: list[tuple[float, int]] = []  # with too little room, most room first
        for sequence in sequences:
            length = self._tokens[sequence]
            while full and -full[0][0] >= length:
                position = heapq.heappop(full)[1]
                heapq.heappush(ready, (bins[position].seconds, position))
            while ready and bins[ready[0][1]].room < length:
                position = heapq.heappop(ready)[1]
                heapq.heappush(full, (-bins[position].room, position))
            if not ready:
                return False
            position = ready[0][1]
            bins[position].put(sequence, length, a * length * length)
            heapq.heapreplace(ready, (bins[position].seconds, position))
        return True

    def best_fit(self, sequences: list[int], limit_s: float) -> list[int]:
        """Each of `sequences`, longest first, where it leaves least time up to `limit_s`.

        Returns those that fit nowhere.
        """
        bins, left = self.bins, []
        spare = sorted((one.spare_s(limit_s), position) for position, one in enumerate(bins))
        for sequence in sequences:
            length = self._tokens[sequence]
            attention_s = self._a * length * length
            at = bisect.bisect_left(spare, (self._clock.alone_s(length), -1))
            end = min(len(spare), at + BEST_FIT_TRIES)
            while at < end and not bins[spare[at][1]].takes(length, attention_s, limit_s):
                at += 1
            if at == end:
                left.append(sequence)
                continue
            position = spare.pop(at)[1]
            bins[position].put(sequence, length, attention_s)
            bisect.insort(spare, (bins[position].spare_s(limit_s), position))
        return left

    def waves(self) -> Waves:
        """What has been decided."""
        seconds = [0.0] * self._num_waves
        for one in self.bins:
            seconds[one.wave] = max(seconds[one.wave], one.seconds)
        return Waves(self.bins, seconds)


def even_level(problem: Problem, lengths: Integers, num_waves: int) -> tuple[float, Integers]:
    """Seconds of each of `num_waves` equal waves if work could be cut as finely as one likes.

    Also the ring sizes that this takes; 0 for sequences that are slower on any ring, which are
    not counted.
    """
    fewest = fewest_ranks(problem, lengths)
    seconds, sizes = alone_s(problem, lengths, fewest), fewest.copy()
    fixed, slots = problem.cost.fixed, num_waves * problem.num_ranks

    def even_s() -> float:
        return fixed + float(((seconds - fixed) * sizes).sum()) / slots

    low = even_s()
    slow = np.flatnonzero(seconds > low)
    high = float(seconds.max(initial=low))
    while len(slow) and high > low * LEVEL_PRECISION:
        # work falls where rings may last longer, so the level is where both meet
        limit_s = min((low + high) / 2, low * 1.02)
        sizes[slow] = smallest_sizes(problem, lengths[slow], fewest[slow], limit_s)
        seconds[slow] = alone_s(problem, lengths[slow], np.maximum(sizes[slow], 1))
        even = even_s()
        if even <= limit_s:
            low, high = max(low, even), limit_s
        else:
            low, high = limit_s, min(high, even)
    return high, sizes
