"""How many waves a step should have, and what they could take at best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megascale.arrays import Integers
from megascale.planner.bound import (
    alone_s,
    fastest_sizes,
    fewest_ranks,
    nested_sizes,
    smallest_sizes,
)
from megascale.planner.hybrid.wave_order import order_waves
from megascale.planner.hybrid.waves import LongWave, even_level, long_waves
from megascale.planner.problem import Problem

LONG_WAVES = (1, 2, 4, 7, 11, 16, 24, 36)
"""How many waves are given to the longest sequences."""
FILLER_LENGTH, FILLER_SHARE = 0.5, 0.8
"""Sequences of at most this part of the capacity fill long waves; this part of them is counted."""
SHARED_ROOM = (0.0, 0.06)
"""Memory that is left free in waves of shared rings, where sequences fit less neatly."""
MORE_WAVES = 3
"""Numbers of waves looked at beyond the first that leaves memory where there is time."""
STRETCH = 1.01
"""How many times an even wave rings may last, usually."""
MORE_WAVES_OF_PIPELINES = 9
"""The same with pipeline stages; each is larger by a third than the last."""


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

    def at(self, positions: Integers) -> list[int]:
        """Indices of the sequences at some positions in order."""
        return [self.order[position] for position in positions.tolist()]

    def split(
        self, positions: Integers, sizes: Integers, capacity: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Of the sequences at `positions`: those with a ring of their own, its size, the others.

        A ring may be one rank that offloads.
        """
        has_ring = (sizes > 1) | (self.lengths[positions] > capacity)
        rings, singles = self.at(positions[has_ring]), self.at(positions[~has_ring])
        return rings, sizes[has_ring].tolist(), singles


@dataclass(frozen=True, eq=False)
class Level:
    """Waves for long sequences, and even waves for the rest, if that could be cut finely."""

    long: list[LongWave]
    num_waves: int
    """Even ones."""
    seconds: float
    """Of each of them."""
    rest: Integers
    """Positions of the sequences that are in no long wave, longest first."""
    crowding: float
    """Tokens of sequences on one rank, over those for which there is both memory and time."""
    shared: int = 0
    """Ranks of the rings that sequences of even waves share; 0: long ones have their own."""

    def step_s(self, pipeline: int) -> float:
        """Seconds of the step, its waves in the best order."""
        waves_s = [wave.seconds for wave in self.long] + [self.seconds] * self.num_waves
        return order_waves(waves_s, pipeline)[1]


def even_levels(problem: Problem, batch: Batch, limit_s: float = math.inf) -> list[Level]:
    """Even waves worth trying, best first; not those that cannot take less than `limit_s`."""
    stages = problem.pipeline
    more = MORE_WAVES if stages == 1 else MORE_WAVES_OF_PIPELINES
    levels = _even_levels(problem, batch, [], more, limit_s)
    roomy = sorted((one for one in levels if one.crowding <= 1), key=lambda one: one.step_s(stages))
    tight = [one for one in levels if one.crowding > 1]
    shared = _shared_levels(problem, batch, [])
    return roomy[:1] + shared[:1] + roomy[1:2] + tight[-1:] + shared[1:] + roomy[2:4]


def long_levels(problem: Problem, batch: Batch) -> list[Level]:
    """Waves of their own for the longest sequences and even ones for the rest, best first."""
    long = long_waves(problem, batch.lengths, LONG_WAVES[-1])
    levels: list[Level] = []
    for number in LONG_WAVES:
        even = _even_levels(problem, batch, long[:number], min(problem.pipeline, 2))
        levels += even + _shared_levels(problem, batch, long[:number])
        if number >= len(long):
            break
    return sorted(levels, key=lambda level: level.step_s(problem.pipeline))


def _shared_levels(problem: Problem, batch: Batch, long: list[LongWave]) -> list[Level]:
    levels = (_shared_level(problem, batch, long, more) for more in SHARED_ROOM)
    return [level for level in levels if level is not None]


def needed_s(problem: Problem, batch: Batch) -> float:
    """Seconds of all work spread evenly, every sequence on as few ranks as hold it."""
    fewest = fewest_ranks(problem, batch.lengths)
    alone = alone_s(problem, batch.lengths, fewest) - problem.cost.fixed
    return float((alone * fewest).sum()) / problem.effective_ranks


def _even_levels(
    problem: Problem,
    batch: Batch,
    long: list[LongWave],
    more: int,
    limit_s: float = math.inf,
) -> list[Level]:
    """Numbers of even waves worth trying: `more` that are roomy, and the last that is tight.

    More waves cost more, if only their fixed parts, but with few of them short sequences have no
    memory where long ones leave time. With pipeline stages more waves leave less idle.
    """
    held = problem.num_ranks * problem.capacity
    rest = batch.lengths[_without(batch, long)]
    filler = _filler(problem, rest, long)[1]
    number = max(1, math.ceil((int(rest.sum()) - filler) / held))
    tight: list[Level] = []
    roomy: list[Level] = []
    fixed, ahead, work_s = problem.cost.fixed, problem.pipeline - 1, 0.0
    if limit_s < math.inf:
        work_s = needed_s(problem, batch)
    while len(roomy) < more:
        is_slow = (number + ahead) * (fixed + work_s / number) >= limit_s
        level = None if is_slow else _level(problem, batch, number, long)
        if level is not None:
            (roomy if level.crowding <= 1 else tight).append(level)
        elif not is_slow or number * number * fixed >= ahead * work_s:  # and more waves are slower
            break
        number += 1 if problem.pipeline == 1 or not roomy else -(-number // 3)
    return tight[-1:] * (not long) + roomy


def _level(
    problem: Problem, batch: Batch, num_waves: int, long: Sequence[LongWave] = ()
) -> Level | None:
    """Sequences that no ring computes within an even wave get waves of their own.

    None where that would be most of them.
    """
    long = list(long)
    while True:
        rest = _without(batch, long)
        filler_s, filler_tokens = _filler(problem, batch.lengths[rest], long)
        seconds, sizes = even_level(problem, batch.lengths[rest], num_waves, filler_s)
        giants = rest[sizes == 0]
        if not len(giants):
            break
        if len(long) + len(giants) > LONG_WAVES[-1]:
            return None
        lengths = batch.lengths[giants]
        own = fastest_sizes(problem, lengths, fewest_ranks(problem, lengths))
        giants_s = alone_s(problem, lengths, own)
        long += [
            LongWave(float(giants_s[i]), giants[i : i + 1], own[i : i + 1], 0.0, 0.0)
            for i in range(len(giants))
        ]
    crowding = _crowding(problem, batch.lengths[rest], num_waves, seconds, filler_tokens)
    return Level(long, num_waves, seconds, rest, crowding)


def _shared_level(
    problem: Problem, batch: Batch, long: list[LongWave], more: float
) -> Level | None:
    """Even waves in which all ranks form rings that just hold the longest sequence left.

    Sizes are powers of two within a node, and whole nodes. There is one wave more than memory
    needs, and this part `more`. None where a ring would be more than all ranks.
    """
    rest = _without(batch, long)
    lengths = batch.lengths[rest].astype(np.float64)
    if not len(rest):
        return None
    node = min(problem.cost.node_size, problem.num_ranks)
    fewest = fewest_ranks(problem, batch.lengths[rest[:1]])
    size = int(nested_sizes(problem, fewest, whole_nodes=True)[0])
    if size > problem.num_ranks:
        return None
    filler_s, filler_tokens = _filler(problem, batch.lengths[rest], long)
    tokens, held = float(lengths.sum()), problem.num_ranks * problem.capacity
    number = 1 + math.ceil(max(0.0, tokens - filler_tokens) / held * (1 + more))
    squares = float((lengths * lengths).sum())
    start_s = float(problem.cost.seconds(0.0, 0.0, size, size <= node))
    work_s = float(problem.cost.seconds(squares, tokens, size, size <= node)) - start_s
    per_wave = number * problem.num_ranks / size
    seconds = start_s + max(0.0, work_s - filler_s / size) / per_wave
    return Level(long, number, seconds, rest, 0.0, size)


def _filler(problem: Problem, lengths: Integers, long: Sequence[LongWave]) -> tuple[float, float]:
    """Work and tokens of short sequences, of the `lengths` left, that long waves can take."""
    short = lengths[lengths <= problem.capacity * FILLER_LENGTH].astype(np.float64)
    work_s = float(problem.cost.compute_s(short).sum()) * FILLER_SHARE
    return (
        min(work_s, sum(wave.filler_s for wave in long)),
        min(float(short.sum()) * FILLER_SHARE, sum(wave.filler_tokens for wave in long)),
    )


def _without(batch: Batch, long: Sequence[LongWave]) -> Integers:
    is_left = np.ones(len(batch.order), dtype=bool)
    for wave in long:
        is_left[wave.members] = False
    return np.flatnonzero(is_left)


def _crowding(
    problem: Problem, lengths: Integers, num_waves: int, level_s: float, filler: float
) -> float:
    limit_s, capacity = level_s * STRETCH, problem.capacity
    sizes = smallest_sizes(problem, lengths, fewest_ranks(problem, lengths), limit_s)
    has_ring = (sizes > 1) | (lengths > capacity)
    rings, sizes = lengths[has_ring], np.maximum(sizes[has_ring], 1)
    free = num_waves * problem.num_ranks - int(sizes.sum())
    memory = np.maximum(0, capacity * sizes - rings)
    work_s = np.maximum(0.0, limit_s - alone_s(problem, rings, sizes)) * sizes
    room = capacity * free + float(np.minimum(memory, work_s / max(problem.cost.b, 1e-12)).sum())
    tokens = int(lengths[~has_ring].sum())
    room += filler
    return tokens / room if room > 0 else float("inf")
