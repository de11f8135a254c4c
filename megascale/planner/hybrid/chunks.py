"""How many chunks each wave of a pipeline is cut into, and in which order waves run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from megascale.arrays import Floats, Seconds
from megascale.planner.chunk_cut import Lines, cut_waves, waves_of
from megascale.planner.chunk_order import backward_passes, stage_order
from megascale.planner.chunk_rules import peak_tokens
from megascale.planner.cost import FORWARD_SHARE, CostModel
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Indexed, Placed, with_padding, with_seconds
from megascale.planner.problem import Problem

QUANTILES = 16
"""Parts of a wave's time at which its tokens are known."""
FINER = 1.3
"""Between the sizes of slots that are tried."""
WORSE = 3
"""Sizes without a better step after which no smaller ones are tried."""
MADE = 8
"""Plans that are made, the most promising first, until one fits exactly."""
SLOTS = 0.35
"""Slots that waves are made for, over the root of stages times work over fixed parts: half of those
that fill a pipeline best, since memory and long rings leave fewer."""
WAVE_SIZE, MOST_WAVE_SIZE = 0.75, 4.0
"""Tokens of a wave that is cut into chunks, over what a rank holds of a micro-batch: as a part of
the stages, and at most."""


def plan_chunked(
    problem: Problem, even_waves: Callable[[Problem], list[list[Placed]]], began: float
) -> StepPlan | None:
    """The best plan whose waves are cut into chunks; None where the problem allows or has none.

    A wave holds more than a rank does of a micro-batch, since chunks that are done make room.
    `even_waves` gives micro-batches in waves, in the orders that are worth trying, for a problem of
    another capacity and without stages.
    """
    if not (problem.may_chunk and len(problem.lengths)):
        return None
    capacity = int(problem.capacity * min(MOST_WAVE_SIZE, WAVE_SIZE * problem.pipeline))
    if int(problem.lengths.max()) > capacity * problem.num_ranks:
        return None
    found: list[tuple[Cut, WaveTable]] = []
    for cost in (_cost_in_chunks(problem, capacity), problem.cost):
        waves = replace(problem, capacity=capacity, cost=cost, pipeline=1, chunks=1, offload=None)
        for placed in even_waves(waves):
            table = WaveTable.of(problem, with_padding(problem, placed))
            found += [(cut, table) for cut in table.cuts()]
    found.sort(key=lambda one: one[0].seconds)
    plans = (table.plan(cut, began) for cut, table in found[:MADE])
    return next((plan for plan in plans if plan is not None), None)


def _cost_in_chunks(problem: Problem, capacity: int) -> CostModel:
    """The cost of a micro-batch of up to `capacity` tokens that is cut: each of its chunks has the
    fixed part and the latency of its ring.

    So rings of many ranks, which have more latency, get less work.
    """
    cost, ranks = problem.cost, problem.effective_ranks
    work_s = float(cost.compute_s(problem.lengths).sum()) / ranks
    waves = max(1.0, float(problem.lengths.sum()) / (capacity * problem.num_ranks))
    slots = SLOTS * math.sqrt(problem.pipeline * work_s / max(cost.fixed, 1e-12))
    chunks = min(max(1.0, slots / waves), problem.chunks)
    return replace(cost, fixed=cost.fixed * chunks, latency=cost.latency * chunks)


@dataclass(frozen=True)
class Cut:
    """Waves in an order, each in a number of chunks."""

    seconds: float
    """Of the step, if all ranks of a wave begin together."""
    order: list[int]
    chunks: list[int]
    """Of wave 0, 1, ..."""


@dataclass(frozen=True)
class WaveTable:
    """What is known of the waves of a plan without making it."""

    problem: Problem
    indexed: Sequence[Indexed]
    seconds: Seconds
    """Of each wave in 1, 2, ... chunks, all of them together, [waves, chunks]."""
    tokens: Floats
    """Most tokens of a rank after each part of a wave's time, [waves, QUANTILES + 1]."""

    @staticmethod
    def of(problem: Problem, indexed: Sequence[Indexed]) -> WaveTable:
        """The waves of micro-batches that stand at their index."""
        waves = waves_of(indexed)
        order = [position for wave in waves for position in wave]
        starts = np.cumsum([0, *map(len, waves)])[:-1]
        seconds = np.maximum.reduceat(_ring_seconds(problem, indexed)[order], starts)
        lines = Lines.of(problem, indexed)
        cuts = lines.cuts(np.full(len(indexed), QUANTILES)).reshape(-1, QUANTILES)
        sizes = np.array([len(one.ranks) for _, one in indexed])
        done = np.ceil((cuts - lines.ring_tokens[:-1, None]) / sizes[:, None])
        done = np.concatenate([np.zeros((len(done), 1)), done], axis=1)
        return WaveTable(problem, indexed, seconds, np.maximum.reduceat(done[order], starts))

    def cuts(self) -> list[Cut]:
        """Orders and chunks of slots of different sizes that memory holds, best first."""
        longest_s, most = float(self.seconds[:, 0].max()), self.seconds.shape[1]
        found: list[Cut] = []
        slot_s, worse = longest_s, 0
        while worse < WORSE and longest_s / slot_s <= most * FINER:
            some = [cut for cut in self._tried(self._chunks(slot_s)) if self._fits(cut)]
            is_best = min((cut.seconds for cut in some), default=0.0) <= min(
                (cut.seconds for cut in found), default=math.inf
            )
            worse = 0 if is_best else worse + 1
            found += some
            slot_s /= FINER
        return sorted(found, key=lambda cut: cut.seconds)

    def _chunks(self, slot_s: float) -> list[int]:
        most = self.seconds.shape[1]
        counts = np.clip(np.rint(self.seconds[:, 0] / slot_s), 1, most)
        return [int(count) for count in counts]

    def _tried(self, chunks: list[int]) -> Iterator[Cut]:
        """Cuts in some orders: longest waves first, last, and in the middle."""
        stages = self.problem.pipeline
        falling = np.argsort(-self.seconds[:, 0], kind="stable").tolist()
        orders = [falling, falling[1::2][::-1] + falling[::2], falling[::2][::-1] + falling[1::2]]
        slots = [float(self.seconds[wave, k - 1]) / k for wave, k in enumerate(chunks)]
        for order in orders[: len(chunks)]:
            counts = [chunks[wave] for wave in order]
            yield Cut(slots_s(counts, [slots[wave] for wave in order], stages), order, chunks)

    def _fits(self, cut: Cut) -> bool:
        """Whether memory holds the chunks, one by one and all at a time."""
        stages, capacity = self.problem.pipeline, self.problem.capacity
        counts = [cut.chunks[wave] for wave in cut.order]
        at = np.linspace(0.0, 1.0, QUANTILES + 1)
        tokens: list[float] = []
        for wave, count in zip(cut.order, counts, strict=True):
            done = np.interp(np.arange(count + 1) / count, at, self.tokens[wave])
            tokens += np.diff(done).tolist()
        held = accumulate(
            -tokens[index] if backward else tokens[index]
            for backward, index in stage_order(counts, stages, 0)
        )
        return max(tokens) <= capacity and max(held) <= stages * capacity

    def plan(self, cut: Cut, began: float | None = None) -> StepPlan | None:
        """The plan of a cut; None where it does not fit, after all."""
        problem = self.problem
        rings = cut_waves(problem, self.indexed, cut.order, cut.chunks)
        lengths = problem.lengths.tolist()
        largest = max(-(-ring.num_tokens(lengths) // len(ring.ranks)) for ring in rings)
        peaks = peak_tokens(rings, lengths, problem.num_ranks, problem.pipeline)
        if largest > problem.capacity or peaks.max() > problem.capacity * problem.pipeline:
            return None
        return with_seconds(problem, rings, problem.pipeline if max(cut.chunks) > 1 else 1, began)


def _ring_seconds(problem: Problem, indexed: Sequence[Indexed]) -> Seconds:
    """Seconds of each micro-batch in 1, 2, ... chunks, all of them together, [rings, chunks].

    What passes through a ring again is that of sequences cut in proportion to their tokens.
    """
    cost, node = problem.cost, problem.cost.node_size
    counts = [len(one.sequences) for _, one in indexed]
    owner = np.repeat(np.arange(len(counts)), counts)
    placed = np.fromiter((i for _, one in indexed for i in one.sequences), np.int64, sum(counts))
    lengths = problem.lengths[placed].astype(np.float64)
    tokens, squares = (np.bincount(owner, x, len(counts)) for x in (lengths, lengths**2))
    sizes = np.array([len(one.ranks) for _, one in indexed], dtype=np.int64)
    inside = np.array([min(one.ranks) // node == max(one.ranks) // node for _, one in indexed])
    once_s = cost.seconds(squares, tokens, sizes, inside)[:, None]
    start_s = (cost.fixed + cost.latency * np.log2(sizes))[:, None]
    chunks = np.arange(1, problem.chunks + 1)
    mean = np.divide(squares, tokens, out=np.zeros_like(tokens), where=tokens > 0)[:, None]
    before = np.maximum(0.0, (chunks * mean - tokens[:, None]) / 2) * (chunks > 1)
    all_s = cost.seconds(squares[:, None], tokens[:, None], sizes[:, None], inside[:, None], before)
    seconds = np.maximum(once_s, all_s) + (chunks - 1) * start_s
    if problem.slowdown:
        seconds *= np.array([problem.slowest(one.ranks) for _, one in indexed])[:, None]
    return seconds


def slots_s(chunks: Sequence[int], slot_s: Sequence[float], stages: int) -> float:
    """Seconds of a step whose wave w is `chunks[w]` slots of `slot_s[w]` seconds.

    The ranks of a slot begin together.
    """
    forward = [s * FORWARD_SHARE for s, k in zip(slot_s, chunks, strict=True) for _ in range(k)]
    backward = [
        s * (1 - FORWARD_SHARE) for s, k in zip(slot_s, chunks, strict=True) for _ in range(k)
    ]
    count, last = len(forward), stages - 1
    free_s, at = [0.0] * stages, [0] * stages
    arrived = [0.0] * count  # when the stage before has run each forward pass
    for index, forwards in backward_passes(chunks):
        for stage in range(stages):
            until, free = min(count, forwards + last - stage), free_s[stage]
            for number in range(at[stage], until):
                if arrived[number] > free:
                    free = arrived[number]
                free += forward[number]
                arrived[number] = free
            at[stage], free_s[stage] = max(at[stage], until), free
        done = 0.0
        for stage in range(last, -1, -1):
            done = max(done, free_s[stage]) + backward[index]
            free_s[stage] = done
    return max(free_s)
