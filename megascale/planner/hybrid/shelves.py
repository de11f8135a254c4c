"""Waves for batches with hardly a short sequence: rings of many sizes, shared by what fits.

Where nothing is left to level waves with, equal waves waste memory. So sequences are packed into
rings as small as memory and a time allow (best fit, longest first), and rings of like duration
stand in one wave, whose time is then that of its longest.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megascale.planner.bound import (
    alone_s,
    fewest_ranks,
    needed_offload,
    nested_sizes,
    sizes_within,
)
from megascale.planner.hybrid.levels import Batch
from megascale.planner.hybrid.wave_order import order_waves
from megascale.planner.plan_builder import Placed
from megascale.planner.problem import Problem
from megascale.planner.scalar_cost import Clock

LONGEST = (0.25, 0.4, 0.3, 0.2)
"""How long a ring may last, in parts of the longest sequence on as few ranks as hold it."""
LONG_SHARE = 0.85
"""Part of a batch's tokens in sequences above half a rank's capacity, from which on it pays."""
MOST_TRIES = 64
"""Shelves with enough memory that are looked at for one with enough time. With no limit, the time
to plan would grow with the square of the number of sequences."""


@dataclass
class Shelf:
    """A ring that several sequences share, without a place yet."""

    size: int
    tokens: int = 0
    squares: int = 0
    seconds: float = 0.0
    sequences: list[int] = field(default_factory=list)


def has_few_short(problem: Problem) -> bool:
    """Whether shelves are worth trying."""
    lengths = problem.lengths
    return bool(lengths[lengths > problem.capacity / 2].sum() >= LONG_SHARE * lengths.sum())


def longest_s(problem: Problem, batch: Batch) -> float:
    """Seconds of the slowest sequence on as few ranks as hold it."""
    fewest = fewest_ranks(problem, batch.lengths)
    return float(alone_s(problem, batch.lengths, fewest).max())


def shelve(
    problem: Problem, batch: Batch, limit_s: float, rounded: bool = True
) -> tuple[float, Callable[[], list[list[Placed]]]] | None:
    """(seconds of a step, its micro-batches in orders of execution) with rings that last at most
    `limit_s`.

    Sizes are `rounded` to powers of two and whole nodes, which stand side by side without rest;
    others may lie across nodes though they would fit one, and then the seconds are too few.
    None where a ring would be larger than all ranks.
    """
    sizes = sizes_within(problem, batch.lengths, limit_s)
    sizes = nested_sizes(problem, sizes, whole_nodes=True) if rounded else sizes
    if sizes.max() > problem.num_ranks:
        return None
    shelves = _filled(problem, batch, sizes, limit_s)
    waves: list[tuple[list[Shelf], int]] = []
    for shelf in sorted(shelves, key=lambda one: -one.seconds):
        for at, (members, free) in enumerate(waves):
            if free >= shelf.size:
                members.append(shelf)
                waves[at] = (members, free - shelf.size)
                break
        else:
            waves.append(([shelf], problem.num_ranks - shelf.size))
    wave_s = [members[0].seconds for members, _ in waves]
    orders, step_s = order_waves(wave_s, problem.pipeline)
    in_order = [[waves[wave][0] for wave in order] for order in orders]
    return step_s, lambda: [_placed(problem, members) for members in in_order]


def _filled(problem: Problem, batch: Batch, sizes: np.ndarray, limit_s: float) -> list[Shelf]:
    clock, node_size = Clock(problem.cost), problem.cost.node_size
    shelves: list[Shelf] = []
    rooms: list[tuple[int, int]] = []
    """(tokens that still fit, which shelf), sorted."""
    for position in np.lexsort((-batch.lengths, -sizes)).tolist():
        length = int(batch.lengths[position])
        first = bisect.bisect_left(rooms, (length, -1))
        for at in range(first, min(len(rooms), first + MOST_TRIES)):
            shelf = shelves[rooms[at][1]]
            seconds = _seconds(clock, node_size, shelf, length)
            if seconds <= limit_s:
                place = rooms.pop(at)[1]
                break
        else:
            shelf, place = Shelf(int(sizes[position])), len(shelves)
            seconds = _seconds(clock, node_size, shelf, length)
            shelves.append(shelf)
        shelf.tokens, shelf.squares = shelf.tokens + length, shelf.squares + length * length
        shelf.seconds = seconds
        shelf.sequences.append(batch.order[position])
        bisect.insort(rooms, (shelf.size * problem.capacity - shelf.tokens, place))
    return shelves


def _seconds(clock: Clock, node_size: int, shelf: Shelf, more: int) -> float:
    squares, tokens = shelf.squares + more * more, shelf.tokens + more
    return clock.shared_s(squares, tokens, shelf.size, shelf.size <= node_size)


def _placed(problem: Problem, waves: list[list[Shelf]]) -> list[Placed]:
    placed, order = [], problem.fast_first()
    for members in waves:
        begin = 0
        for shelf in sorted(members, key=lambda one: -one.size):
            offload = needed_offload(problem, shelf.tokens, shelf.size)
            ranks = order[begin : begin + shelf.size]
            placed.append(Placed(ranks, shelf.sequences, offload))
            begin += shelf.size
    return placed
