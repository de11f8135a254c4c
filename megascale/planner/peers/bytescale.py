"""ByteScale's planners: best fit and the balance scheduler, with rings of `ring_sizes`.

Source: ByteScale (arXiv 2502.21231), Algorithms 1 and 2. What the paper leaves open is
decided here and said where it is decided.
"""

from __future__ import annotations

import heapq
import math
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megascale.planner.cost import CostModel
from megascale.planner.peers.ring_sizes import RingSizes, smallest_ring
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import Problem

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NUM_BUCKETS = 16
"""Buckets of equal work that Algorithm 2 cuts the sequences into; the paper gives no number."""
TOLERANCE = 0.002
"""Part of an even share of the work by which a rank may lag: the paper's delta, not given."""


def best_fit(tokens: list[int], capacity: int, order: Iterable[int]) -> list[list[int]]:
    """Bins of at most `capacity` tokens; each item of `order` goes where least room is left.

    Among equally full bins the oldest is taken. No item may exceed the capacity.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for item in order:
        at = bisect_left(rooms, (tokens[item], -1))
        if at == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room, chosen = rooms.pop(at)
        bins[chosen].append(item)
        if room > tokens[item]:
            insort(rooms, (room - tokens[item], chosen))
    return bins


def plan_bytescale_naive(problem: Problem) -> StepPlan:
    """HDP without balancing (ByteScale, Algorithm 1).

    Sequences above the capacity get rings of their own, in order of arrival; the others are
    packed best fit, in order of arrival, into micro-batches of one rank. Each of these takes the
    next ranks of the first round of micro-batches that has enough left, so ranks get equally many
    tokens but not equally much work. Raises UserError where a sequence is too long for all ranks.

    Open in the paper, decided here: the tokens C of a rank are those of `_capacities`. All
    micro-batches have the same tokens in the paper, whose batches fill them. So where the last
    round would stay partly empty, packs are filled less than C, so that all ranks have one.
    """
    return _best_capacity(problem, _naive)


def _naive(problem: Problem) -> list[Placed]:
    tokens, sizes = problem.lengths.tolist(), _ring_sizes(problem)
    rings = np.flatnonzero(problem.lengths > problem.capacity).tolist()
    units = [(int(sizes.ranks[i]), [i], float(sizes.offload[i])) for i in rings]
    short = np.flatnonzero(problem.lengths <= problem.capacity).tolist()
    turns = sum(unit[0] for unit in units)
    packs = _even_bins(tokens, problem.capacity, short, problem.num_ranks, turns)
    return _in_rounds(problem.num_ranks, [*units, *((1, pack, 0.0) for pack in packs)])


def _even_bins(
    tokens: list[int], capacity: int, order: list[int], num_ranks: int, turns: int
) -> list[list[int]]:
    """`best_fit` with the least capacity that needs no more rounds of `num_ranks` bins.

    `turns` places of the rounds are taken. The least capacity is found to a part of 1/64.
    """
    bins = best_fit(tokens, capacity, order)
    most = -(-(turns + len(bins)) // num_ranks) * num_ranks - turns
    low = max((tokens[item] for item in order), default=0)
    low = max(low, -(-sum(tokens[item] for item in order) // max(1, most)))
    step = max(1, (capacity - low) // 64)
    first, last = 0, (capacity - low) // step  # in steps above `low`
    while first < last:
        middle = (first + last) // 2
        found = best_fit(tokens, low + middle * step, order)
        if len(found) <= most:
            bins, last = found, middle
        else:
            first = middle + 1
    return bins


def _capacities(problem: Problem) -> list[Problem]:
    """The problem with the values of C that a user of ByteScale would set.

    C, the tokens of a rank in a micro-batch, is a setting. Memory limits it. Where the ranks can
    hold more than the batch, that C leaves ranks without work, and with P pipeline stages fewer
    than P micro-batches leave stages without work. The second C is an even share of the tokens:
    one micro-batch for each rank and stage. Offload saves memory, which then is not short.
    """
    tokens, ranks = problem.lengths, problem.num_ranks
    fewest = -(-int(tokens.max(initial=1)) // ranks)
    share = max(fewest, -(-int(tokens.sum()) // (ranks * problem.pipeline)))
    if share >= problem.capacity:
        return [problem]
    return [problem, replace(problem, capacity=share, offload=None)]


def _best_capacity(problem: Problem, place: Callable[[Problem], list[Placed]]) -> StepPlan:
    """The plan of least predicted time over the values of C in `_capacities`."""
    began = time.perf_counter()
    problem.require_fit()
    plans = [complete(problem, place(variant), began) for variant in _capacities(problem)]
    return min(plans, key=lambda plan: plan.predicted_s)


def _in_rounds(num_ranks: int, units: list[tuple[int, list[int], float]]) -> list[Placed]:
    """First fit of (size, sequences, offload) into rounds in which each rank has one turn."""
    left = np.full(len(units) + 1, num_ranks)
    first = opened = 0
    rounds: list[list[Placed]] = [[] for _ in units]
    for size, sequences, share in units:
        at = first + int(np.argmax(left[first : opened + 2] >= size))
        begin = num_ranks - int(left[at])
        rounds[at].append(Placed(range(begin, begin + size), sequences, share))
        left[at] -= size
        opened = max(opened, at)
        while left[first] == 0:
            first += 1
    return [placed for one in rounds for placed in one]


def plan_bytescale(problem: Problem) -> StepPlan:
    """HDP with the balance scheduler (ByteScale, Algorithm 2).

    Sequences, longest first, are cut into buckets of equal work, and work is given to the ranks
    that lag. DP-balance takes it from the first bucket that has any, so that ranks run like
    beside like; it is used in free and lockstep mode. PP-balance takes from all buckets in turn,
    so that a pipeline keeps to one level of lengths as far as it can; it is used in aligned mode.
    (The paper's rule is the same: DP-balance without pipeline stages, PP-balance with them.)
    Rings have the size of Eq. 3 (see `smallest_ring`). Raises UserError where a sequence is too
    long for all ranks.

    Open in the paper, decided here: the tokens C of a rank are those of `_capacities`. A
    micro-batch is the longest sequence left in its bucket and then, where that is no ring, the
    longest ones that still fit the capacity and the time by which its rank lags. Where the bucket
    runs out, DP-balance goes on with the next one, which then is the first, and PP-balance with a
    bucket of the same length, which is of the same level. "Lags" is measured from the time at which
    all ranks would end together if what is left could be cut at will; at the start, when all are at
    0, so all do lag. Also PP-balance gives the rings first: they have one index on all their ranks,
    and a rank that ran many short micro-batches before would make the others of its ring run empty
    ones.
    """
    return _best_capacity(problem, _balanced)


def _balanced(problem: Problem) -> list[Placed]:
    buckets = _buckets(problem)
    balance = _Balance(problem, len(buckets))
    placed: list[Placed] = []
    levels, turn = list(range(len(buckets))), -1
    while levels:
        across = problem.mode == "aligned" and buckets[levels[0]].longest <= problem.capacity
        turn = (turn + 1) % len(levels) if across else 0
        level = levels[turn]
        bucket, later = buckets[level], [buckets[other] for other in levels if other > level]
        following = [one for one in later if not across or one.longest == bucket.longest]
        placed.append(balance.give(bucket, level, following))
        if not bucket.left:
            turn -= 1
            balance.aim()
        levels = [other for other in levels if buckets[other].left]
    return placed


def _ring_sizes(problem: Problem) -> RingSizes:
    """Sizes by Eq. 3, with offload where its ring takes no longer than an even share of work."""
    lengths, cost, num_ranks = problem.lengths, problem.cost, problem.num_ranks
    even_s = float(cost.compute_s(lengths).sum()) / num_ranks or math.inf
    return smallest_ring(lengths, problem.capacity, cost, problem.offload, num_ranks, even_s)


class _Bucket:
    """Sequences of a level of lengths, longest first, of which any can be taken out."""

    def __init__(self, sequences: list[int], tokens: list[int]) -> None:
        self.left = len(sequences)
        self.longest = tokens[sequences[0]]
        self._sequences = sequences
        self._keys = [-tokens[sequence] for sequence in sequences]
        self._next = list(range(len(sequences) + 1))

    def take(self, at_most: float) -> int | None:
        """Remove and return the longest sequence left of at most so many tokens, if any."""
        position, next_left = bisect_left(self._keys, -at_most), self._next
        while next_left[position] != position:
            next_left[position] = next_left[next_left[position]]
            position = next_left[position]
        if position == len(self._sequences):
            return None
        next_left[position] = position + 1
        self.left -= 1
        return self._sequences[position]


def _buckets(problem: Problem) -> list[_Bucket]:
    """Sequences by length, longest first, in buckets of about equal work, rings apart."""
    order = np.argsort(-problem.lengths, kind="stable")
    work = np.cumsum(problem.cost.compute_s(problem.lengths[order]))
    if not len(order):
        return []
    total = work[-1] if work[-1] > 0 else 1.0
    level = np.ceil(np.minimum(1.0, work / total) * NUM_BUCKETS - 1e-9)
    is_ring = problem.lengths[order] > problem.capacity
    cuts = np.flatnonzero(np.diff(level) + np.diff(is_ring)) + 1
    tokens = problem.lengths.tolist()
    return [_Bucket(one.tolist(), tokens) for one in np.split(order, cuts)]


class _Balance:
    """Ranks by the time at which they end, and who of them lags (state of Algorithm 2)."""

    def __init__(self, problem: Problem, num_levels: int) -> None:
        cost, lengths, sizes = problem.cost, problem.lengths, _ring_sizes(problem)
        squares = lengths.astype(np.float64) ** 2
        within_s = cost.seconds(squares, lengths, sizes.ranks, True)
        across_s = cost.seconds(squares, lengths, sizes.ranks, False)
        # Of the fixed time of a micro-batch, a sequence owes the part of it that it fills.
        owed = np.minimum(1.0, lengths / problem.capacity)
        shares_s = sizes.ranks * within_s - (1 - owed) * cost.fixed
        self._problem = problem
        self._tokens: list[int] = lengths.tolist()
        self._sizes: list[int] = sizes.ranks.tolist()
        self._offload: list[float] = sizes.offload.tolist()
        self._ring_s: tuple[list[float], list[float]] = (across_s.tolist(), within_s.tolist())
        self._compute_s: list[float] = cost.compute_s(lengths).tolist()
        self._share_s: list[float] = shares_s.tolist()
        self._left_s = float(shares_s.sum())
        self._delta_s = TOLERANCE * self._left_s / problem.num_ranks
        # A rank stands in the heap of the level that it ran last. The last heap has those that
        # ran nothing yet; outside aligned mode, where levels do not matter, it has all.
        self._by_level = problem.mode == "aligned"
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(num_levels + 1)]
        self._heaps[-1] = [(0.0, rank) for rank in range(problem.num_ranks)]
        self.aim()

    def aim(self) -> None:
        """Set the time at which all ranks would end if what is left could be cut at will."""
        ends = np.sort([end_s for heap in self._heaps for end_s, _ in heap])
        level_s = (self._left_s + np.cumsum(ends)) / np.arange(1, len(ends) + 1)
        self._goal_s = max(float(level_s.min()), float(ends[0]) + 2 * self._delta_s)

    def give(self, bucket: _Bucket, level: int, following: Sequence[_Bucket] = ()) -> Placed:
        """Give lagging ranks their next micro-batch, with sequences of `bucket`.

        Where that runs out, a pack takes sequences of the `following` buckets too.
        """
        if min(heap[0][0] for heap in self._heaps if heap) > self._goal_s - self._delta_s:
            self.aim()
        first = bucket.take(math.inf)
        assert first is not None, "an empty bucket"
        chosen = self._lagging(self._sizes[first], level, self._ring_s[True][first])
        begin_s = max(end_s for end_s, _ in chosen)
        ranks = sorted(rank for _, rank in chosen)
        if self._tokens[first] > self._problem.capacity:
            node = self._problem.cost.node_size
            sequences, end_s = [first], begin_s
            end_s += self._ring_s[ranks[0] // node == ranks[-1] // node][first]
        else:
            sequences, end_s = self._fill([bucket, *following], first, begin_s)
        self._left_s -= sum(self._share_s[sequence] for sequence in sequences)
        heap = self._heaps[level if self._by_level else -1]
        for rank in ranks:
            heapq.heappush(heap, (end_s, rank))
        return Placed(ranks, sequences, self._offload[first])

    def _lagging(self, count: int, level: int, seconds: float) -> list[tuple[float, int]]:
        """Take out the next (end, rank) for `seconds` of work.

        Ranks of the same level go first, if they have time for it, then those without any work,
        then those that lag most.
        """
        chosen: list[tuple[float, int]] = []
        same, idle, latest_s = self._heaps[level], self._heaps[-1], self._goal_s - seconds
        while len(chosen) < count:
            if same and same[0][0] <= latest_s + self._delta_s:
                heap = same
            elif idle:
                heap = idle
            else:
                heap = min((one for one in self._heaps if one), key=lambda one: one[0])
            chosen.append(heapq.heappop(heap))
        return chosen

    def _fill(
        self, buckets: Sequence[_Bucket], first: int, begin_s: float
    ) -> tuple[list[int], float]:
        """Sequences of a micro-batch of one rank that begins with `first`, and when it ends."""
        cost, sequences = self._problem.cost, [first]
        room = self._problem.capacity - self._tokens[first]
        end_s = begin_s + cost.fixed + self._compute_s[first]
        for bucket in buckets:
            while room and bucket.left and end_s < self._goal_s:
                until_s = self._goal_s + self._delta_s
                found = bucket.take(min(room, _tokens_within(cost, until_s - end_s)))
                if found is None:
                    return sequences, end_s
                sequences.append(found)
                room -= self._tokens[found]
                end_s += self._compute_s[found]
        return sequences, end_s


def _tokens_within(cost: CostModel, seconds: float) -> float:
    """Length of the sequence that takes so long on one rank, without the fixed part."""
    slope = cost.b + math.sqrt(cost.b * cost.b + 4 * cost.a * seconds)
    return 2 * seconds / slope if slope > 0 else math.inf
