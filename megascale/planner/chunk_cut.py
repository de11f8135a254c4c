"""Cuts the waves of a plan into chunks that take equally long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megascale.arrays import Integers, Seconds
from megascale.planner.plan_builder import Indexed
from megascale.planner.problem import Problem
from megascale.planner.ring import Ring


@dataclass(frozen=True)
class Lines:
    """Micro-batches as lines of tokens, each with the tokens of its sequences in turn.

    All micro-batches stand one after another on one line. Seconds are those of the work that
    tokens add on one rank, without fixed parts.
    """

    sequences: Integers
    """Their indices in the step, [sequences]."""
    tokens: Integers
    """Where each sequence ends on the line."""
    seconds: Seconds
    """The same in seconds."""
    ring_tokens: Integers
    """Where each micro-batch begins on the line, and the end of the last, [rings + 1]."""
    ring_seconds: Seconds
    """The same in seconds."""
    a: float
    b: Seconds
    """Seconds per token of each sequence, attention excepted."""

    @staticmethod
    def of(problem: Problem, indexed: Sequence[Indexed]) -> Lines:
        """The lines of micro-batches."""
        cost = problem.cost
        counts = [len(one.sequences) for _, one in indexed]
        sequences = np.fromiter(
            (i for _, one in indexed for i in one.sequences), np.int64, sum(counts)
        )
        lengths = problem.lengths[sequences]
        transfer = [
            (cost.transfer_intra if _one_node(problem, one.ranks) else cost.transfer_inter)
            * (len(one.ranks) > 1)
            for _, one in indexed
        ]
        b = np.repeat(cost.b + np.array(transfer), counts)
        tokens = np.cumsum(lengths)
        seconds = np.cumsum((cost.a * lengths + b) * lengths)
        ends = np.cumsum([0, *counts])
        return Lines(
            sequences,
            tokens,
            seconds,
            np.concatenate([[0], tokens])[ends],
            np.concatenate([[0.0], seconds])[ends],
            cost.a,
            b,
        )

    def cuts(self, chunks: Integers) -> Integers:
        """Where on the line the chunks of all micro-batches end, one after another.

        `chunks` says how many each micro-batch has, [rings].
        """
        ring = np.repeat(np.arange(len(chunks)), chunks)
        place = np.arange(len(ring)) - np.repeat(np.cumsum(chunks) - chunks, chunks) + 1
        begin, end = self.ring_seconds[ring], self.ring_seconds[ring + 1]
        at = begin + (end - begin) * place / chunks[ring]
        if not len(self.sequences):
            return np.zeros(len(ring), dtype=np.int64)
        number = np.minimum(np.searchsorted(self.seconds, at), len(self.sequences) - 1)
        before = np.concatenate([[0.0], self.seconds])[number]
        left, rate = np.maximum(0.0, at - before), self.b[number]
        # a t^2 + b t = left, solved in the form that does not cancel
        root = rate + np.sqrt(rate * rate + 4 * self.a * left)
        inside = np.divide(2 * left, root, out=np.zeros_like(left), where=root > 0)
        cut = np.concatenate([[0], self.tokens])[number] + np.rint(inside).astype(np.int64)
        cut = np.where(place == chunks[ring], self.ring_tokens[ring + 1], cut)
        return np.clip(cut, self.ring_tokens[ring], self.ring_tokens[ring + 1])

    def pieces(self, cuts: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """(chunk, sequence, begin, end) of all tokens: each piece is of one chunk and sequence."""
        bounds = np.unique(np.concatenate([[0], self.tokens, cuts]))
        begin, end = bounds[:-1], bounds[1:]
        number = np.searchsorted(self.tokens, begin, side="right")
        first = np.concatenate([[0], self.tokens])[number]
        chunk = np.searchsorted(cuts, begin, side="right")
        return chunk, self.sequences[number], begin - first, end - first


def _one_node(problem: Problem, ranks: Sequence[int]) -> bool:
    size = problem.cost.node_size
    return min(ranks) // size == max(ranks) // size


def waves_of(indexed: Sequence[Indexed]) -> list[list[int]]:
    """Positions of the micro-batches of each wave."""
    waves: list[list[int]] = [[] for _ in range(1 + max((index for index, _ in indexed)))]
    for position, (index, _) in enumerate(indexed):
        waves[index].append(position)
    return waves


def cut_waves(
    problem: Problem,
    indexed: Sequence[Indexed],
    order: Sequence[int],
    chunks: Sequence[int],
) -> tuple[Ring, ...]:
    """The rings of a plan that runs the waves of `indexed` in `order`, in that many chunks each.

    `chunks` counts those of wave 0, 1, ... A rank that has no part in a wave, and one in a later
    wave, gets empty micro-batches.
    """
    lines = Lines.of(problem, indexed)
    of_ring = np.array([chunks[index] for index, _ in indexed], dtype=np.int64)
    chunk, sequence, begin, end = lines.pieces(lines.cuts(of_ring))
    slots = np.cumsum(of_ring) - of_ring
    edges = np.searchsorted(chunk, np.arange(int(of_ring.sum()) + 1)).tolist()
    numbers = sequence.tolist()
    spans = list(zip(begin.tolist(), end.tolist(), strict=True))
    rings: list[Ring] = []
    index = 0
    for wave, positions, absent in _with_absent(problem, indexed, order):
        count, first = chunks[wave], len(rings)
        for place in range(count):
            for at, position in enumerate(positions):
                one = indexed[position][1]
                slot = int(slots[position]) + place
                low, high = edges[slot], edges[slot + 1]
                parts = tuple(numbers[low:high])
                group = (first + at, place, count, tuple(spans[low:high])) if count > 1 else ()
                ranks = tuple(one.ranks)
                rings.append(Ring(len(rings), ranks, parts, one.offload, index + place, *group))
            for at, rank in enumerate(absent, start=len(positions)):
                group = (first + at, place, count, ()) if count > 1 else ()
                rings.append(Ring(len(rings), (rank,), (), 0.0, index + place, *group))
        index += count
    return tuple(rings)


def _with_absent(
    problem: Problem, indexed: Sequence[Indexed], order: Sequence[int]
) -> list[tuple[int, list[int], list[int]]]:
    """(wave, its micro-batches, ranks without any that have one in a later wave), in order."""
    waves, found = waves_of(indexed), []
    later: set[int] = set()
    for wave in reversed(order):
        present = {rank for position in waves[wave] for rank in indexed[position][1].ranks}
        found.append((wave, waves[wave], sorted(later - present)))
        later |= present
    return found[::-1]
