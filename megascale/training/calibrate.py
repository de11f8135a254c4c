"""Micro-batches of the real model, timed on this machine over a grid of lengths and ring sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megascale.config import RunConfig
from megascale.corpus.batches import GlobalBatch
from megascale.errors import UserError
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.build import build_model
from megascale.planner.fit import Measurement
from megascale.planner.plan import StepPlan
from megascale.planner.ring import Ring
from megascale.runtime.distributed import Ranks
from megascale.training.reading import reader_of
from megascale.training.step import Learner, run_micro_batches

FEWEST_CELLS = 6
"""A grid is not thinned below this many cells of each ring size."""
SHORTEST = 16
"""Default lengths go down to this part of the longest."""
TELL_EVERY_S = 5.0


class Cell(NamedTuple):
    """One point of the grid: what a ring of `size` ranks is given."""

    lengths: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Calibration:
    """What was measured."""

    measurements: tuple[Measurement, ...]
    node_size: int
    """Consecutive ranks of the HDP axis that share a node."""
    left_out: int
    """Cells of the grid for which there was no time."""
    repeats: int
    """Times that every measurement was taken."""
    seconds: float


def ring_sizes(hdp: int) -> list[int]:
    """Ring sizes to measure: all up to 4, powers of two above, and the whole axis."""
    sizes = {size for size in (1, 2, 3, 4, hdp) if size <= hdp}
    power = 8
    while power < hdp:
        sizes.add(power)
        power *= 2
    return sorted(sizes)


def default_lengths(longest: int) -> list[int]:
    """Lengths to measure: halves of the longest, four times over."""
    lengths = {max(1, longest * part // SHORTEST) for part in (1, 2, 4, 8, 16)}
    return sorted(lengths)


def grid(lengths: Sequence[int], capacity: int, longest: int, hdp: int, seed: int) -> list[Cell]:
    """Micro-batches for every ring size, the most telling first.

    Per ring size: single sequences of `lengths`, packs of equal ones that fill the ring, wholly
    and to a quarter, and packs of mixed ones; for one rank also none. A ring holds up to
    `capacity` tokens per rank, and no sequence is longer than `longest`.
    """
    generator = np.random.default_rng(seed)
    per_size = []
    for size in ring_sizes(hdp):
        most = size * capacity
        fitting = [length for length in lengths if length <= min(most, longest)]
        singles = [(length,) for length in fitting]
        full = [(length,) * (most // length) for length in fitting if most // length > 1]
        quarter = [(length,) * (most // 4 // length) for length in fitting if most // 4 > length]
        mixed = [_mixed(generator, fitting, int(most * part)) for part in (1.0, 0.6, 0.3)]
        found = [*_spread(singles), *_spread(full), *mixed, *_spread(quarter)]
        if size == 1:
            found.insert(0, ())
        per_size.append([Cell(tuple(one), size) for one in dict.fromkeys(found)])
    return [cell for cells in _in_turn(per_size) for cell in cells]


def _spread(options: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Ends first, then middles, so that every beginning covers the range."""
    order, gaps = [len(options) - 1, 0], [(0, len(options) - 1)]
    while gaps:
        first, last = gaps.pop(0)
        if last - first > 1:
            middle = (first + last) // 2
            order.append(middle)
            gaps += [(first, middle), (middle, last)]
    return [options[index] for index in dict.fromkeys(order)] if options else []


def _mixed(generator: np.random.Generator, lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Lengths between the shortest and the longest, evenly on a log scale, of `tokens` in all."""
    low, high = min(lengths), min(max(lengths), tokens)
    drawn: list[int] = []
    while sum(drawn) < tokens:
        length = int(np.exp(generator.uniform(np.log(min(low, high)), np.log(high))))
        drawn.append(max(1, min(length, tokens - sum(drawn))))
    return tuple(drawn)


def _in_turn(per_size: Sequence[Sequence[Cell]]) -> Iterator[list[Cell]]:
    for index in range(max(map(len, per_size))):
        yield [cells[index] for cells in per_size if index < len(cells)]


def calibrate(
    config: RunConfig,
    ranks: Ranks,
    lengths: Sequence[int] | None,
    repeats: int,
    budget_s: float,
    say: Callable[[str], None],
) -> Calibration:
    """Time the model of a finalized config on these ranks.

    All ranks are busy during each measurement, as in training: the HDP axis is full of rings of
    the same size. A first round warms up and is not counted; the grid is cut to what it gets
    done in its part of `budget_s`. `say` gets a line about progress now and then. Raises UserError
    for `lengths` that no rank can hold.
    """
    capacity = config.planner.capacity_tokens
    assert capacity is not None, "the config is not finalized"
    hdp = ranks.layout.hdp
    longest = min(config.data.context_tokens, capacity * hdp)
    lengths = sorted(set(lengths)) if lengths else default_lengths(longest)
    if lengths[0] > min(capacity, longest) or lengths[-1] > longest:
        raise UserError(
            f"--lengths: {lengths[-1] if lengths[-1] > longest else lengths[0]} tokens; the "
            f"shortest may have {min(capacity, longest)} (one rank's capacity) and the longest "
            f"{longest} (the context, on {hdp} ranks of {capacity} tokens)"
        )
    cells = grid(lengths, capacity, longest, hdp, config.seed)
    bench = _Bench(config, ranks, budget_s)
    rounds = _Rounds(bench, cells, repeats, budget_s, say)
    kept = rounds.warm_up()
    samples = rounds.measure(kept)
    measurements = tuple(
        Measurement(cell.lengths, cell.size, one_node, tuple(seconds))
        for (cell, one_node), seconds in sorted(samples.items(), key=_by_size)
    )
    left_out = len(cells) - len(kept)
    return Calibration(measurements, bench.node_size, left_out, rounds.done, bench.elapsed_s)


def _by_size(item: tuple[tuple[Cell, bool], object]) -> tuple[int, bool, int, int]:
    (cell, one_node), _ = item
    return cell.size, not one_node, sum(cell.lengths), len(cell.lengths)


class _Bench:
    """The model on this rank, and how long micro-batches take on it."""

    def __init__(self, config: RunConfig, ranks: Ranks, budget_s: float) -> None:
        self._began = time.perf_counter()
        self._config, self._ranks = config, ranks
        self._learner = Learner(config, ranks, build_model(config, ranks), None)
        self._count = ranks.layout.pipeline
        self._reader = self._random_tokens()
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
        self._nodes = [rank // local_world for rank in ranks.axis.ranks]
        self.node_size = self._nodes.count(self._nodes[0])
        self.elapsed_s = 0.0
        """Since the start, by the clock of rank 0, so that all ranks decide alike."""

    def _random_tokens(self) -> MicroBatchReader:
        config, ranks = self._config, self._ranks
        vocab = config.model.vocab_size or 2
        tokens = _RandomTokens(config.data.context_tokens, vocab, config.seed)
        source = TokenSource("random", tokens, vocab - 1, vocab)  # type: ignore[arg-type]
        return reader_of(config, ranks, [source])

    def run(self, cell: Cell) -> list[tuple[bool, float]]:
        """Run `cell` on all rings of its size at once; (within a node, seconds) of each.

        The seconds are those of the slowest rank of the ring. With p pipeline stages p equal
        micro-batches run after one another, which take 2 * p - 1 times as long as one on a stage.
        """
        rings = _fill(cell, self._ranks.layout.hdp)
        micro_batches = list(self._reader.read(*_planned(rings, self._count)))
        model = self._learner.model
        model.zero_grad_buffer()
        dist.barrier(group=self._ranks.control)
        began = time.perf_counter()
        with model.no_sync():
            run_micro_batches(self._learner, micro_batches, self._count)
        torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = self._slowest(now - began, now - self._began)
        whole = [members for members, lengths in rings if len(members) == cell.size]
        return [
            (
                len({self._nodes[one] for one in members}) == 1,
                float(seconds[list(members)].max()) / (2 * self._count - 1),
            )
            for members in whole
        ]

    def _slowest(self, seconds: float, elapsed_s: float) -> np.ndarray:
        """Seconds of each position on the HDP axis, the slowest of its ranks."""
        mine = torch.tensor([seconds, elapsed_s, self._ranks.hdp_rank], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self._ranks.world)]
        dist.all_gather(everyone, mine, group=self._ranks.control)
        table = torch.stack(everyone).numpy()
        self.elapsed_s = float(table[0, 1])
        slowest = np.zeros(self._ranks.layout.hdp)
        np.maximum.at(slowest, table[:, 2].astype(int), table[:, 0])
        return slowest


class _RandomTokens:
    """A shard of documents that are all the same, as random as a model of speed needs."""

    prefix = "random tokens"

    def __init__(self, longest: int, vocab: int, seed: int) -> None:
        self._tokens = np.random.default_rng(seed).integers(0, vocab, longest + 1)

    def read(self, document: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """As `Shard.read`."""
        return self._tokens[start:][:count]


Filled = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""(ranks of the HDP axis, lengths) of rings that are busy at the same time."""


def _fill(cell: Cell, hdp: int) -> Filled:
    """The HDP axis full of rings of the cell's size; ranks that are left get as much each."""
    rings: Filled = []
    for first in range(0, hdp, cell.size):
        members = tuple(range(first, min(first + cell.size, hdp)))
        part = [max(1, length * len(members) // cell.size) for length in cell.lengths]
        rings.append((members, tuple(part)))
    return rings


def _planned(rings: Filled, count: int) -> tuple[StepPlan, GlobalBatch]:
    """`count` micro-batches on each of `rings`, as a plan and its batch."""
    lengths = np.array([one for _, part in rings for one in part] * count, dtype=np.int32)
    placed: list[Ring] = []
    begin = 0
    for index in range(count):
        for members, part in rings:
            sequences = tuple(range(begin, begin + len(part)))
            placed.append(Ring(len(placed), members, sequences, 0.0, index))
            begin += len(part)
    num_ranks = sum(len(members) for members, _ in rings)
    plan = StepPlan(num_ranks, "free", int(lengths.sum()) + 1, 0.0, 0.0, 0.0, tuple(placed))
    zeros = np.zeros(len(lengths), dtype=np.int64)
    return plan, GlobalBatch(0, zeros.astype(np.int16), zeros, zeros, lengths)


class _Rounds:
    """Rounds over the grid, as many as there is time for."""

    def __init__(
        self,
        bench: _Bench,
        cells: list[Cell],
        repeats: int,
        budget_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._bench, self._cells, self._repeats = bench, cells, repeats
        self._budget_s, self._say = budget_s, say
        self._seconds: dict[Cell, float] = {}
        self._told_s = 0.0
        self.done = 0

    def warm_up(self) -> list[Cell]:
        """Run every cell once, or as many as there is time for; returns those."""
        sizes = len({cell.size for cell in self._cells})
        until_s = self._budget_s / (self._repeats + 1)
        for index, cell in enumerate(self._cells):
            began_s = self._bench.elapsed_s
            if began_s > until_s and index >= FEWEST_CELLS * sizes:
                break
            self._bench.run(cell)
            self._seconds[cell] = self._bench.elapsed_s - began_s
            cells_left = 2 * FEWEST_CELLS * sizes - index - 1
            least_s = self._bench.elapsed_s * (1 + cells_left / (index + 1))
            self._tell("warm-up", index + 1, len(self._cells), max(self._budget_s, least_s))
        return list(self._seconds)

    def measure(self, kept: Sequence[Cell]) -> dict[tuple[Cell, bool], list[float]]:
        """Seconds of the rings of each kept cell, within a node and across, in all rounds.

        Rounds instead of repeats of one cell after another: what disturbs the machine for a while
        then falls on one repeat of many cells. At least one round is done.
        """
        samples: dict[tuple[Cell, bool], list[float]] = {}
        round_s = sum(self._seconds.values())
        for _ in range(self._repeats):
            if self.done and self._bench.elapsed_s + round_s > self._budget_s:
                break
            for index, cell in enumerate(kept):
                for one_node, seconds in self._bench.run(cell):
                    samples.setdefault((cell, one_node), []).append(seconds)
                left_s = (self._repeats - self.done - (index + 1) / len(kept)) * round_s
                end_s = min(self._bench.elapsed_s + left_s, self._budget_s)
                if not self.done:  # one round is done whatever it takes
                    this_round_s = (1 - (index + 1) / len(kept)) * round_s
                    end_s = max(end_s, self._bench.elapsed_s + this_round_s)
                self._tell(f"round {self.done + 1} of {self._repeats}", index + 1, len(kept), end_s)
            self.done += 1
        return samples

    def _tell(self, what: str, done: int, of: int, end_s: float) -> None:
        now = self._bench.elapsed_s
        if done == of or now - self._told_s > TELL_EVERY_S:
            self._told_s = now
            left_s = max(0.0, end_s - now)
            self._say(f"{what}: {done} of {of} micro-batches, at most {left_s:.0f} s left")
