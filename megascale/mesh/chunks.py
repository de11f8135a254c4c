"""Which tokens of a ring's sequences each of its ranks holds. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def chunk_bounds(lengths: Sequence[int], size: int) -> Integers:
    """Where to cut each sequence into the 2 * `size` chunks of a ring: (N, 2 * size + 1).

    Place i of the ring holds chunks i and 2 * size - 1 - i of each sequence, so that all places
    have nearly the same mask area (ByteScale, dist-attention). A place's tokens of a sequence
    are its length / size, rounded up or down, and of all sequences together the same: the
    places that get one more take turns, so no place holds more than ceil(sum / size). Lengths
    need no padding, and chunks may be empty.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    base, extra = np.divmod(tokens, size)
    first = np.cumsum(extra) - extra  # the place whose turn it is, before the modulus
    turn = (np.arange(size)[None] - first[:, None]) % size
    share_ND = base[:, None] + (turn < extra[:, None])
    front = share_ND // 2
    sizes = np.concatenate([front, (share_ND - front)[:, ::-1]], axis=1)
    return np.concatenate([np.zeros((len(tokens), 1), np.int64), sizes.cumsum(axis=1)], axis=1)


@dataclass(frozen=True)
class RingShare:
    """One rank's part in a ring of two or more.

    It holds, sequence after sequence, chunk `place` and then chunk 2 * size - 1 - `place`.
    """

    ranks: tuple[int, ...]
    """Global torch ranks of the ring, in ring order."""
    place: int
    """This rank is `ranks[place]`."""
    bounds: Integers
    """Chunk bounds of the ring's sequences, from `chunk_bounds`."""
    group: Any
    """The one process group of the HDP axis, over which all rings exchange."""
    calls: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What attention is to compute at each hop; filled by the first layer, used by all."""

    @property
    def size(self) -> int:
        """Ranks of the ring."""
        return len(self.ranks)

    def starts(self, place: int) -> Integers:
        """Positions in the sequence at which the two chunks of `place` start, (N, 2)."""
        return self.bounds[:, [place, -2 - place]]

    def sizes(self, place: int) -> Integers:
        """Tokens in the two chunks of `place`, (N, 2)."""
        return self.bounds[:, [place + 1, -1 - place]] - self.starts(place)

    def num_tokens(self, place: int) -> int:
        """Tokens that `place` holds of all sequences."""
        return int(self.sizes(place).sum())

    def lengths(self) -> list[int]:
        """Tokens of each sequence on this rank, 0 included."""
        return [int(n) for n in self.sizes(self.place).sum(axis=1)]

    def positions(self) -> Integers:
        """The position in its sequence of every token on this rank."""
        starts, sizes = self.starts(self.place), self.sizes(self.place)
        parts = [
            np.arange(start, start + size)
            for start, size in zip(starts.flat, sizes.flat, strict=True)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        """(start, tokens) of the contiguous parts of one sequence on this rank."""
        first, second = self.starts(self.place)[sequence]
        front, back = self.sizes(self.place)[sequence]
        if first + front == second:
            parts = [(first, front + back)]
        else:
            parts = [(first, front), (second, back)]
        return [(int(start), int(tokens)) for start, tokens in parts if tokens]
