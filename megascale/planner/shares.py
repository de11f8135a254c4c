"""What one rank has of each sequence: token ranges, positions, cumulative lengths. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.arrays import Integers
from megascale.planner.ring import Ring


def chunk_bounds(lengths: ArrayLike, size: int) -> Integers:
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
class Share:
    """What one place of a ring has of the ring's sequences.

    It holds, sequence after sequence, chunk `place` and then chunk 2 * size - 1 - `place`.
    """

    place: int
    """From 0, in the order of the ring's ranks."""
    bounds: Integers
    """Chunk bounds of the ring's sequences, from `chunk_bounds`; where the ring computes a part of
    each sequence, of these parts, as positions in the sequence."""

    @property
    def size(self) -> int:
        """Ranks of the ring."""
        return int(self.bounds.shape[1] - 1) // 2

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


@dataclass(frozen=True, eq=False)
class RankMicroBatch:
    """One micro-batch of a plan, as one of its ranks runs it.

    The rank's tokens are packed: sequence after sequence, each with the tokens of `token_ranges`.
    """

    ring: Ring
    """The micro-batch in the plan."""
    share: Share
    """What this rank has of it."""

    @staticmethod
    def of(ring: Ring, rank: int, lengths: Sequence[int]) -> RankMicroBatch:
        """The micro-batch `ring` on `rank`, which is one of its ranks.

        `lengths` are the tokens of all sequences of the step.
        """
        spans = np.array(ring.token_spans(lengths), dtype=np.int64).reshape(-1, 2)
        bounds = spans[:, :1] + chunk_bounds(spans[:, 1] - spans[:, 0], len(ring.ranks))
        return RankMicroBatch(ring, Share(ring.ranks.index(rank), bounds))

    @property
    def sequences(self) -> tuple[int, ...]:
        """Its sequences, as indices into the lengths of the step; none: it only keeps step."""
        return self.ring.sequences

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that share each of its sequences, in ring order: rank `ranks[i]` sends keys
        and values to `ranks[(i + 1) % len(ranks)]`. One rank: the sequences are whole."""
        return self.ring.ranks

    @property
    def place(self) -> int:
        """This rank is `ranks[place]`."""
        return self.share.place

    @property
    def offload(self) -> float:
        """Part of the activations that is kept in host memory, 0 to 1."""
        return self.ring.offload

    @property
    def num_tokens(self) -> int:
        """Tokens on this rank."""
        return self.share.num_tokens(self.place)

    @property
    def token_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(start, stop) of the tokens of each sequence on this rank; at most two ranges each.

        Of a chunk, they lie in `ring.spans`."""
        return tuple(
            tuple((start, start + tokens) for start, tokens in self.share.spans(place))
            for place in range(len(self.sequences))
        )

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """Where each sequence begins in the rank's pack, and the end: int32[sequences + 1]."""
        return np.cumsum([0, *self.share.lengths()]).astype(np.int32)

    @property
    def positions(self) -> Integers:
        """Position of each token of the pack in its own sequence: int64[num_tokens]."""
        return self.share.positions()
