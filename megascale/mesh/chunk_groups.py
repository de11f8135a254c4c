"""What the chunks of a group have in common on a rank, from one micro-batch to the next."""

from __future__ import annotations

from typing import Any

from megascale.mesh.chunk_cache import Chunk, ChunkCache
from megascale.mesh.ring_share import RingShare
from megascale.planner.shares import RankMicroBatch


class ChunkGroups:
    """Makes the shares of chunks, in the order in which the rank runs them."""

    def __init__(self, on_host: bool = False) -> None:
        """`on_host` is that of the caches."""
        self._on_host = on_host
        self._earlier: list[Chunk] = []
        self._cache = ChunkCache(on_host)

    def share(self, mine: RankMicroBatch, ranks: tuple[int, ...], group: Any) -> RingShare:
        """The share of a chunk; `ranks` and `group` are those of `RingShare`.

        The chunks of a group have one cache, which lives as long as their micro-batches.
        """
        if mine.ring.chunk == 0:
            self._earlier, self._cache = [], ChunkCache(self._on_host)
        place, bounds = mine.share.place, mine.share.bounds
        share = RingShare(
            *(place, bounds, ranks, group),
            sequences=mine.sequences,
            earlier=tuple(self._earlier),
            cache=self._cache,
            is_last=mine.ring.chunk == mine.ring.chunks - 1,
        )
        self._earlier.append(Chunk(mine.sequences, bounds))
        return share
