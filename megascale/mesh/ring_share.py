"""One rank's share of a ring, with the group over which the ring exchanges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megascale.arrays import Integers
from megascale.mesh.chunk_cache import Chunk, ChunkCache
from megascale.planner.shares import Share

Piece = tuple[int, int, int]
"""(row, position in the sequence, tokens) of contiguous tokens."""
PREFIX = "prefix"
"""In a key of `RingShare.calls`: what is known of earlier chunks."""


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

    def prefix(self, window: int | None) -> Prefix:
        """The tokens of earlier chunks that this one sees through `window`; made once."""
        if (PREFIX, window) not in self.calls:
            before = [self._before(place, window) for place in range(self.size)]
            self.calls[PREFIX, window] = Prefix(*zip(*before, strict=True))
        prefix: Prefix = self.calls[PREFIX, window]
        return prefix

    def _before(self, place: int, window: int | None) -> tuple[list[list[Piece]], int]:
        """What `Prefix` has of one place."""
        seen: dict[int, list[Piece]] = {sequence: [] for sequence in self.sequences}
        begins = self.bounds[:, 0] - (window - 1) if window else np.zeros_like(self.bounds[:, 0])
        first = dict(zip(self.sequences, begins.tolist(), strict=False))
        begin = 0
        for sequences, bounds in self.earlier:
            share = RingShare(place, bounds, self.ranks, None)
            for sequence, pieces in zip(sequences, share.pieces(place), strict=True):
                for row, start, size in pieces if sequence in seen else ():
                    hidden = max(0, first[sequence] - start)
                    if hidden < size:
                        seen[sequence].append((begin + row + hidden, start + hidden, size - hidden))
            begin += share.num_tokens(place)
        # whole sequences have no numbers here, and nothing before them
        return list(seen.values()) or [[] for _ in self.bounds], begin


class Prefix(NamedTuple):
    """What a chunk sees of the chunks before it."""

    pieces: tuple[list[list[Piece]], ...]
    """Of each place and sequence, the pieces in causal order, with their rows among the tokens of
    all earlier chunks there, chunk after chunk."""
    tokens: tuple[int, ...]
    """Of each place, tokens of all earlier chunks."""

    def num_seen(self, place: int) -> int:
        """Tokens on `place` that the chunk sees."""
        return sum(size for pieces in self.pieces[place] for _, _, size in pieces)

    def rows(self, place: int) -> slice | Integers:
        """The rows of these tokens, sequence after sequence."""
        parts = [
            np.arange(row, row + size) for pieces in self.pieces[place] for row, _, size in pieces
        ]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        is_all = np.array_equal(rows, np.arange(self.tokens[place]))
        return slice(None) if is_all else rows
