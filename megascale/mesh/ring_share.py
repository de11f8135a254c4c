"""One rank's share of a ring, with the group over which the ring exchanges."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megascale.arrays import Integers
from megascale.mesh.chunk_cache import Chunk, ChunkCache
from megascale.planner.shares import Share

Piece = tuple[int, int, int]
"""(row, position in the sequence, tokens) of contiguous tokens."""


@dataclass(frozen=True)
class RingShare(Share):
    """One rank's part in a ring: of two ranks or more, or of one that computes chunks."""

    ranks: tuple[int, ...]
    """Global torch ranks of the ring, in ring order; this rank is `ranks[place]`."""
    group: Any
    """The one process group of the HDP axis, over which all rings exchange."""
    calls: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What attention is to compute at each hop; filled by the first layer, used by all."""
    sequences: tuple[int, ...] = ()
    """The sequences of a chunk, as indices into the lengths of the step."""
    earlier: tuple[Chunk, ...] = ()
    """The chunks of the group before this one."""
    cache: ChunkCache | None = field(default=None, repr=False, compare=False)
    """What the chunks of the group keep; None where sequences are whole."""
    is_last: bool = True
    """No chunk of the group comes after this one."""

    def pieces(self, place: int) -> list[tuple[Piece, ...]]:
        """Of each sequence, the two pieces of `place`, with their rows in its pack."""
        sizes, starts = self.sizes(place), self.starts(place)
        rows = sizes.cumsum().reshape(sizes.shape) - sizes
        table = np.stack([rows, starts, sizes], axis=-1).tolist()
        return [tuple((row, start, size) for row, start, size in pair) for pair in table]

    def prefix(self, place: int) -> list[list[Piece]]:
        """Of each sequence, the pieces that earlier chunks left on `place`, in causal order.

        Rows count the tokens of all earlier chunks, chunk after chunk.
        """
        found: dict[int, list[Piece]] = {sequence: [] for sequence in self.sequences}
        begin = 0
        for sequences, bounds in self.earlier:
            share = RingShare(place, bounds, self.ranks, None)
            for sequence, pieces in zip(sequences, share.pieces(place), strict=True):
                if sequence in found:
                    moved = [(begin + row, start, size) for row, start, size in pieces if size]
                    found[sequence] += moved
            begin += share.num_tokens(place)
        return list(found.values())

    @cached_property
    def num_keys(self) -> tuple[int, ...]:
        """Tokens on each place that this chunk attends to: of the chunks before it, and its own."""
        return tuple(
            sum(size for pieces in self.prefix(place) for _, _, size in pieces)
            + self.num_tokens(place)
            for place in range(self.size)
        )

    @cached_property
    def prefix_rows(self) -> slice | Integers:
        """Rows of all tokens of earlier chunks here to which this chunk attends, in the order of
        its sequences."""
        pieces = [piece for pieces in self.prefix(self.place) for piece in pieces]
        rows = np.concatenate(
            [np.empty(0, np.int64), *(np.arange(row, row + size) for row, _, size in pieces)]
        )
        is_all = np.array_equal(rows, np.arange(self._tokens_before()))
        return slice(None) if is_all else rows

    def _tokens_before(self) -> int:
        shares = (RingShare(self.place, chunk.bounds, self.ranks, None) for chunk in self.earlier)
        return sum(share.num_tokens(self.place) for share in shares)
