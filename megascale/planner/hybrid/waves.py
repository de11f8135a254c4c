"""Plans in waves: every rank runs its k-th micro-batch at the same time as all others do.

All waves but those of giants are made equally long, so a plan is bin packing: W waves of N ranks
are W * N equal bins of time and memory, a ring takes as many bins of one wave as it has ranks, and
short sequences fill what is left of all of them.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megascale.arrays import Integers
from megascale.planner.bound import (
    RingSizes,
    alone_s,
    fewest_ranks,
    needed_offload,
    sizes_within,
    smallest_sizes,
)
from megascale.planner.hybrid.free_ranks import FreeRanks
from megascale.planner.hybrid.wave_order import order_waves
from megascale.planner.plan_builder import Placed
from megascale.planner.problem import Problem
from megascale.planner.scalar_cost import Clock, Rates

LEVEL_PRECISION = 1.003
"""How exactly the length of even waves is found."""
RING_GROWTH = (1, 1.25, 1.5, 2, 3, 4, 6, 8)
"""Sizes tried for the longest ring of a wave, times the fewest ranks that hold its sequence."""
BEST_FIT_TRIES = 64
"""Micro-batches looked at for one with enough memory, of those with enough time."""


class Bin:
    """One micro-batch while it is being filled."""

    __slots__ = (
        "_attention_s",
        "_rates",
        "_target_s",
        "_tokens",
        "offload",
        "ranks",
        "room",
        "seconds",
        "sequences",
        "size",
        "slow",
        "wave",
    )

    def __init__(
        self,
        wave: int,
        ranks: tuple[int, ...],
        room: int,
        target_s: float,
        rates: Rates,
        slow: float,
    ) -> None:
        self.wave, self.ranks, self.size, self.room = wave, ranks, len(ranks), room
        self.slow = slow
        self._target_s = target_s
        self.sequences: list[int] = []
        self.offload = 0.0
        self.seconds = slow * rates.start_s
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

    def takes(self, length: int, attention_s: float) -> bool:
        """Whether a sequence fits in memory and in the time of the wave."""
        if self.room < length:
            return False
        seconds = self._seconds(self._tokens + length, self._attention_s + attention_s)
        return seconds <= self._target_s

    @property
    def late_s(self) -> float:
        """Seconds beyond those of the wave; below 0 where there is time left."""
        return self.seconds - self._target_s

    @property
    def spare_s(self) -> float:
        """Seconds of work on one rank that fit into the wave; a little less for rings."""
        return (self._target_s - self.seconds) * self.size / self.slow

    def _seconds(self, tokens: int, attention_s: float) -> float:
        start_s, rate, passing = self._rates
        passing_s = passing * tokens
        shared_s = attention_s if attention_s > passing_s else passing_s
        return self.slow * (start_s + (rate * tokens + shared_s) / self.size)


@dataclass
class Waves:
    """A plan in waves."""

    bins: list[Bin]
    orders: list[list[int]]
    """Of execution, the most promising first."""
    step_s: float
    """Seconds of a step whose ranks begin each wave together, in the first order."""

    def placed(self) -> list[list[Placed]]:
        """Micro-batches in each of the orders of execution."""
        return [self._in_order(order) for order in self.orders]

    def _in_order(self, order: list[int]) -> list[Placed]:
        place = {wave: position for position, wave in enumerate(order)}
        bins = sorted(self.bins, key=lambda one: (place[one.wave], one.ranks[0]))
        return [Placed(one.ranks, one.sequences, one.offload) for one in bins if one.sequences]


class Sheet:
    """The waves of one plan while they are being filled."""

    def __init__(self, problem: Problem, tokens: list[int], target_s: Sequence[float]) -> None:
        """`target_s` are the seconds that each wave shall last."""
        self._problem, self._tokens, self._target_s = problem, tokens, target_s
        self._clock, self._a = Clock(problem.cost), problem.cost.a
        self._node_size = problem.cost.node_size
        self._order = problem.fast_first()
        self._free = FreeRanks(problem, len(target_s), self._order)
        self._paces = sorted(set(problem.slowdown)) or [1.0]
        self.bins: list[Bin] = []

    def add_rings(self, sequences: list[int], sizes: list[int], wave: int | None = None) -> bool:
        """Give each sequence, largest ring first, a ring of its own; False if one has no room.

        In any wave, or in the given one. `sizes` are those that fast ranks need. A ring has ranks
        of one pace where such are left, the fastest first; slower ones are more of them.
        """
        order = sorted(zip(sizes, sequences, strict=True), key=lambda one: (-one[0], one[1]))
        limit_s = self._target_s[-1 if wave is None else wave]
        lengths = np.array([self._tokens[sequence] for _, sequence in order], dtype=np.int64)
        by_pace = [[size for size, _ in order]]
        for pace in self._paces[1:]:
            by_pace.append(sizes_within(self._problem, lengths, limit_s / pace).tolist())
        for at, (size, sequence) in enumerate(order):
            taken = None
            for pace, needed in zip(self._paces, by_pace, strict=True):
                taken = taken or self._take(needed[at], wave, pace)
            if taken is None and len(self._paces) > 1:
                taken = self._take(size, wave, None)
            if taken is None:
                return False
            self._open(*taken, sequence)
        return True

    def _take(
        self, size: int, wave: int | None, pace: float | None
    ) -> tuple[int, tuple[int, ...]] | None:
        """A wave and places in it for a ring of `size` ranks of one pace, or of all."""
        taken, free = None, self._free
        if size <= self._node_size:
            taken = (
                free.take_within(size, pace)
                if wave is None
                else free.take_in_wave(size, wave, pace)
            )
        return taken or free.take_across(size, wave, pace)

    def open_rest(self, size: int) -> None:
        """Open micro-batches on rings of `size` ranks while there is room, then on single ranks."""
        for pace in [*self._paces, *([None] if len(self._paces) > 1 else [])]:
            while size > 1:
                taken = self._take(size, None, pace)
                if taken is None:
                    break
                self._open(*taken)
        for wave, rank in self._free.rest():
            self._open(wave, (rank,))

    def _open(self, wave: int, places: Sequence[int], sequence: int | None = None) -> Bin:
        ranks = tuple(self._order[place] for place in places)
        one_node = ranks[0] // self._node_size == ranks[-1] // self._node_size
        rates = self._clock.rates(len(ranks), one_node)
        room = self._problem.capacity * len(ranks)
        slow = self._problem.slowest(ranks)
        one = Bin(wave, ranks, room, self._target_s[wave], rates, slow)
        if sequence is not None:
            length = self._tokens[sequence]
            one.offload = needed_offload(self._problem, length, one.size)
            one.put(sequence, length, self._a * length * length)
        self.bins.append(one)
        return one

    def level(self, sequences: list[int]) -> bool:
        """Each of `sequences`, longest first, where most time of a wave is left and has room.

        False where none has.
        """
        bins, a = self.bins, self._a
        ready = [(one.late_s, position) for position, one in enumerate(bins)]
        heapq.heapify(ready)
        full: list[tuple[float, int]] = []  # with too little room, most room first
        for sequence in sequences:
            length = self._tokens[sequence]
            while full and -full[0][0] >= length:
                position = heapq.heappop(full)[1]
                heapq.heappush(ready, (bins[position].late_s, position))
            while ready and bins[ready[0][1]].room < length:
                position = heapq.heappop(ready)[1]
                heapq.heappush(full, (-bins[position].room, position))
            if not ready:
                return False
            position = ready[0][1]
            bins[position].put(sequence, length, a * length * length)
            heapq.heapreplace(ready, (bins[position].late_s, position))
        return True

    def best_fit(self, sequences: list[int]) -> list[int]:
        """Each of `sequences`, longest first, where it leaves least time of a wave.

        Returns those that fit nowhere.
        """
        bins, left = self.bins, []
        spare = sorted((one.spare_s, position, one.room) for position, one in enumerate(bins))
        for sequence in sequences:
            length = self._tokens[sequence]
            attention_s = self._a * length * length
            at = bisect.bisect_left(spare, (self._clock.alone_s(length), -1, 0))
            for tried in range(at, min(len(spare), at + BEST_FIT_TRIES)):
                _, position, room = spare[tried]  # most fail for want of room: seen without a call
                if room >= length and bins[position].takes(length, attention_s):
                    break
            else:
                left.append(sequence)
                continue
            del spare[tried]
            bins[position].put(sequence, length, attention_s)
            bisect.insort(spare, (bins[position].spare_s, position, bins[position].room))
        return left

    def waves(self) -> Waves:
        """What has been decided."""
        seconds = [0.0] * len(self._target_s)
        for one in self.bins:
            seconds[one.wave] = max(seconds[one.wave], one.seconds)
        return Waves(self.bins, *order_waves(seconds, self._problem.pipeline))


def even_level(
    problem: Problem, lengths: Integers, num_waves: int, done_s: float = 0.0
) -> tuple[float, Integers]:
    """Seconds of each of `num_waves` equal waves if work could be cut as finely as one likes.

    Also the ring sizes that this takes; 0 for sequences that are slower on any ring, which are
    not counted. `done_s` is work, in seconds of one rank, that is done elsewhere.
    """
    fewest = fewest_ranks(problem, lengths)
    seconds, sizes = alone_s(problem, lengths, fewest), fewest.copy()
    fixed, slots = problem.cost.fixed, num_waves * problem.effective_ranks

    def even_s() -> float:
        work_s = float(((seconds - fixed) * sizes).sum()) - done_s
        return fixed + max(0.0, work_s) / slots

    low = even_s()
    slow = np.flatnonzero(seconds > low)
    ring_sizes = RingSizes(problem, lengths[slow], fewest[slow])
    high = float(seconds.max(initial=low))
    while len(slow) and high > low * LEVEL_PRECISION:
        # work falls where rings may last longer, so the level is where both meet
        limit_s = min((low + high) / 2, low * 1.02)
        sizes[slow] = ring_sizes.smallest(limit_s)
        seconds[slow] = alone_s(problem, lengths[slow], np.maximum(sizes[slow], 1))
        even = even_s()
        if even <= limit_s:
            low, high = max(low, even), limit_s
        else:
            low, high = limit_s, min(high, even)
    return high, sizes


@dataclass(frozen=True)
class LongWave:
    """A wave made for long sequences, on rings that suit them."""

    seconds: float
    members: Integers
    """Positions of its sequences among all, longest first."""
    sizes: Integers
    """Ranks of each."""
    filler_s: float
    """Seconds of work on one rank for which it has time and memory left."""
    filler_tokens: float
    """Tokens for which it has time and memory left."""


def long_waves(problem: Problem, lengths: Integers, most: int) -> list[LongWave]:
    """Waves for the longest of `lengths`, which fall, one after another, `most` of them at most.

    Each lasts as long as its longest sequence on the ring that leaves least of the wave unused.
    """
    waves: list[LongWave] = []
    left = np.arange(len(lengths))
    while len(waves) < most and len(left) and lengths[left[0]] > problem.capacity:
        head = left[: 4 * problem.num_ranks]
        fewest = int(fewest_ranks(problem, lengths[head[:1]])[0])
        node = problem.cost.node_size
        sizes = {min(problem.num_ranks, int(fewest * grow)) for grow in RING_GROWTH}
        sizes |= {min(node, problem.num_ranks), problem.num_ranks}
        tried = [_long_wave(problem, lengths, head, d) for d in sorted(sizes) if d >= fewest]
        used, best = max(tried, key=lambda one: one[0])
        waves.append(best)
        left = left[~np.isin(left, best.members)]
    return waves


def _long_wave(
    problem: Problem, lengths: Integers, head: Integers, first_size: int
) -> tuple[float, LongWave]:
    """(part of the wave that is used well, wave) with the longest on `first_size` ranks."""
    tokens = lengths[head]
    seconds = float(alone_s(problem, tokens[:1], np.array([first_size]))[0])
    fewest = fewest_ranks(problem, tokens)
    sizes = smallest_sizes(problem, tokens, fewest, seconds)
    sizes[0] = first_size
    fits = (sizes > 0) & (np.cumsum(sizes) <= problem.num_ranks)
    free = problem.num_ranks - int(sizes[fits].sum())
    for place in np.flatnonzero(~fits & (sizes > 0) & (sizes <= free)).tolist():
        if sizes[place] <= free:
            fits[place] = True
            free -= int(sizes[place])
    tokens, sizes = tokens[fits], sizes[fits]
    fixed, all_s = problem.cost.fixed, seconds * problem.num_ranks
    needed_s = float(((alone_s(problem, tokens, fewest[fits]) - fixed) * fewest[fits]).sum())
    busy_s = float((alone_s(problem, tokens, sizes) * sizes).sum()) + fixed * free
    room = max(0.0, problem.capacity * problem.num_ranks - float(tokens.sum()))
    filler_s = min(max(0.0, all_s - busy_s), room * problem.cost.b)
    filler_tokens = filler_s / problem.cost.b if problem.cost.b else room
    wave = LongWave(seconds, head[fits], sizes, filler_s, filler_tokens)
    return (needed_s + filler_s) / all_s if all_s else 0.0, wave
