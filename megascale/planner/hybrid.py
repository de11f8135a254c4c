"""The default planner: rings of any size, chosen by time as well as by memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megascale.planner.bound import (
    alone_s,
    fastest_sizes,
    fewest_ranks,
    smallest_sizes,
)
from megascale.planner.plan import StepPlan
from megascale.planner.problem import Placed, Problem, complete
from megascale.planner.stacks import Stacks
from megascale.planner.waves import Sheet, even_level

Integers = NDArray[np.int64]

TRIES = 6
"""Plans that are made, of which the best is taken, where no budget of seconds says."""
STACKS = ((1.0, False), (1.0, True), (0.5, False))
"""Ways to stack rings: how long they may last, as part of an even share, and whether sizes within
a node are rounded up to powers of two, which nest."""
SPARSE_BATCHES = 1.5
"""Micro-batches per rank below which free plans are tried in waves too."""
GOOD_ENOUGH = 1.002
"""Time over that of perfectly even waves at which no better way to fill them is looked for."""
MORE_WAVES = 3
"""Numbers of waves looked at beyond the first that leaves memory where there is time."""
MORE_WAVES_OF_PIPELINES = 9
"""The same with pipeline stages; each is larger by a third than the last."""


def plan_hybrid(problem: Problem) -> StepPlan:
    """Plan a step as near to the lower bound as its mode allows.

    Free mode: rings stacked on the least busy ranks, the rest leveled with short sequences
    (`planner.stacks`). Aligned and lockstep mode: waves of equal length (`planner.waves`).
    Several ring sizes and numbers of waves are tried, `TRIES` of them or as many as `budget_s`
    allows; the plan with the least predicted time is taken.
    """
    began = time.perf_counter()
    problem.require_fit()
    batch = Batch.of(problem)
    best: Candidate | None = None
    for number, candidate in enumerate(_candidates(problem, batch), start=1):
        if best is None or candidate.seconds < best.seconds:
            best = candidate
        spent_s = time.perf_counter() - began
        if number == TRIES if problem.budget_s is None else spent_s > problem.budget_s:
            break
    return complete(problem, best.placed() if best else [], began)


Way = tuple[float, Callable[[Sheet, list[int], float], bool]]
"""How many times an even wave rings may last, and how the rest is filled in."""


@dataclass(frozen=True)
class Batch:
    """The sequences of a problem, longest first."""

    order: list[int]
    """Their indices."""
    lengths: Integers
    """Their tokens, in this order."""
    tokens: list[int]
    """Tokens of every sequence, by index."""

    @staticmethod
    def of(problem: Problem) -> Batch:
        """Sort the sequences of `problem`."""
        order = np.argsort(-problem.lengths, kind="stable")
        return Batch(order.tolist(), problem.lengths[order], problem.lengths.tolist())

    def split(self, sizes: Integers, capacity: int) -> tuple[list[int], list[int], list[int]]:
        """Sequences with a ring of their own, the sizes of these, and sequences to pack.

        `sizes` are those of the last sequences in order. A ring may be one rank that offloads.
        """
        order, first = self.order, len(self.order) - len(sizes)
        has_ring = (sizes > 1) | (self.lengths[first:] > capacity)
        shared = np.flatnonzero(has_ring).tolist()
        single = np.flatnonzero(~has_ring).tolist()
        rings = [order[first + position] for position in shared]
        return rings, sizes[shared].tolist(), [order[first + position] for position in single]


@dataclass(frozen=True)
class Candidate:
    """A plan and what it is predicted to take."""

    seconds: float
    placed: Callable[[], list[Placed]]


def _candidates(problem: Problem, batch: Batch) -> Iterator[Candidate]:
    if not batch.order:
        return
    if problem.mode != "free":
        yield from _waves(problem, batch)
        return
    even_s, _ = even_level(problem, batch.lengths, 1)
    for part, nest in STACKS:
        yield _stacks(problem, batch, even_s * part, nest)
    if problem.lengths.sum() < SPARSE_BATCHES * problem.num_ranks * problem.capacity:
        yield from _waves(problem, batch)


def _stacks(problem: Problem, batch: Batch, limit_s: float, nest: bool) -> Candidate:
    fewest = fewest_ranks(problem, batch.lengths)
    sizes = smallest_sizes(problem, batch.lengths, fewest, limit_s)
    sizes = np.where(sizes == 0, fastest_sizes(problem, batch.lengths, fewest), sizes)
    if nest:
        node = min(problem.cost.node_size, problem.num_ranks)
        nested = np.minimum(node, 2 ** np.ceil(np.log2(sizes))).astype(np.int64)
        sizes = np.where(sizes <= node, nested, sizes)
    rings, ring_sizes, singles = batch.split(sizes, problem.capacity)
    stacks = Stacks(problem, batch.tokens)
    stacks.add_rings(rings, ring_sizes)
    stacks.level(stacks.fill_gaps(singles))
    return Candidate(stacks.seconds, stacks.placed)


@dataclass(frozen=True)
class Level:
    """Even waves, as they would be if work could be cut as finely as one likes."""

    num_waves: int
    """Beside those of giants."""
    seconds: float
    """Of each of them."""
    sizes: Integers
    """Ranks of each giant, longest first, that has a wave of its own."""
    giants_s: float
    """Seconds of the waves of giants."""
    longest_s: float
    """Seconds of the longest wave of all."""
    crowding: float
    """Tokens of sequences on one rank, over those for which there is both memory and time."""

    def step_s(self, pipeline: int) -> float:
        """Seconds of the step; stages wait for the longest wave while a pipeline fills."""
        waves_s = self.num_waves * self.seconds + self.giants_s
        return waves_s + (pipeline - 1) * self.longest_s


def _level(problem: Problem, batch: Batch, num_waves: int) -> Level:
    """Sequences that no ring computes within an even wave are giants."""
    giants = 0
    while True:
        rest = batch.lengths[giants:]
        seconds, sizes = even_level(problem, rest, num_waves)
        more = int((sizes == 0).sum())
        giants += more
        if not more:
            break
    lengths = batch.lengths[:giants]
    sizes = fastest_sizes(problem, lengths, fewest_ranks(problem, lengths))
    giants_s = alone_s(problem, lengths, sizes)
    longest_s = max(seconds, float(giants_s.max(initial=0.0)))
    crowding = _crowding(problem, rest, num_waves, seconds)
    return Level(num_waves, seconds, sizes, float(giants_s.sum()), longest_s, crowding)


def _waves(problem: Problem, batch: Batch) -> Iterator[Candidate]:
    """Plans in waves: the most promising numbers of waves and ways to fill them first."""
    levels = _levels(problem, batch)
    best_s = float("inf")
    for ways in WAYS:
        for level in levels:
            for way in ways:
                if best_s <= level.step_s(problem.pipeline) * GOOD_ENOUGH:
                    break
                candidate = _filled(problem, batch, level, way)
                if candidate is None:
                    break
                best_s = min(best_s, candidate.seconds)
                yield candidate
    number = max(level.num_waves for level in levels)
    candidate = None
    while best_s == float("inf") and candidate is None:
        number *= 2  # with a wave for each sequence there is room
        candidate = _filled(problem, batch, _level(problem, batch, number), WAYS[0][0])
    if candidate is not None:
        yield candidate


def _filled(problem: Problem, batch: Batch, level: Level, way: Way) -> Candidate | None:
    """A plan with rings of at most the level times a stretch; None where memory is too tight."""
    stretch, fill = way
    giants, limit_s = len(level.sizes), level.seconds * stretch
    rest = batch.lengths[giants:]
    fewest = fewest_ranks(problem, rest)
    sizes = smallest_sizes(problem, rest, fewest, limit_s)
    sizes = np.where(sizes == 0, fastest_sizes(problem, rest, fewest), sizes)
    rings, ring_sizes, singles = batch.split(sizes, problem.capacity)
    sheet = Sheet(problem, batch.tokens, level.num_waves + giants)
    rings, ring_sizes = batch.order[:giants] + rings, level.sizes.tolist() + ring_sizes
    if not sheet.add_rings(rings, ring_sizes):
        return None
    sheet.open_rest()
    if not fill(sheet, singles, limit_s):
        return None
    waves = sheet.waves()
    seconds = sum(waves.seconds) + (problem.pipeline - 1) * max(waves.seconds)
    return Candidate(seconds, waves.placed)


def _levels(problem: Problem, batch: Batch) -> list[Level]:
    """Numbers of waves worth trying, best first.

    More waves cost more, if only their fixed parts, but with few of them short sequences have no
    memory where long ones leave time. With pipeline stages more waves leave less idle.
    """
    held = problem.num_ranks * problem.capacity
    fewest = max(1, -(-int(problem.lengths.sum()) // held))
    tight: list[Level] = []
    roomy: list[Level] = []
    number = fewest
    while len(roomy) < (MORE_WAVES if problem.pipeline == 1 else MORE_WAVES_OF_PIPELINES):
        level = _level(problem, batch, number)
        (roomy if level.crowding <= 1 else tight).append(level)
        number += 1 if problem.pipeline == 1 or not roomy else -(-number // 3)
    roomy.sort(key=lambda level: level.step_s(problem.pipeline))
    return roomy[:2] + tight[-1:] + roomy[2:4]


def _crowding(problem: Problem, lengths: Integers, num_waves: int, level_s: float) -> float:
    limit_s, capacity = level_s * WAYS[0][0][0], problem.capacity
    sizes = smallest_sizes(problem, lengths, fewest_ranks(problem, lengths), limit_s)
    has_ring = (sizes > 1) | (lengths > capacity)
    rings, sizes = lengths[has_ring], np.maximum(sizes[has_ring], 1)
    free = num_waves * problem.num_ranks - int(sizes.sum())
    memory = np.maximum(0, capacity * sizes - rings)
    work_s = np.maximum(0.0, limit_s - alone_s(problem, rings, sizes)) * sizes
    room = capacity * free + float(np.minimum(memory, work_s / max(problem.cost.b, 1e-12)).sum())
    tokens = int(lengths[~has_ring].sum())
    return tokens / room if room > 0 else float("inf")


def _by_level(sheet: Sheet, singles: list[int], limit_s: float) -> bool:
    return sheet.level(singles)


def _by_best_fit(sheet: Sheet, singles: list[int], limit_s: float) -> bool:
    return sheet.level(sheet.best_fit(singles, limit_s))


WAYS: tuple[tuple[Way, ...], ...] = (
    ((1.01, _by_level), (1.01, _by_best_fit)),
    ((1.005, _by_best_fit), (1.02, _by_level), (1.02, _by_best_fit), (1.0, _by_level)),
    ((1.04, _by_level), (1.015, _by_best_fit), (1.0, _by_best_fit)),
)
"""Ways to fill waves, the most promising first; all numbers of waves have their turn with each."""
