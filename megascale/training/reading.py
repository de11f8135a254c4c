"""How the ranks of a run read their micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from megascale.config import RunConfig
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.build import pack_multiple
from megascale.model.counts import windows
from megascale.runtime.distributed import Ranks


def reader_of(config: RunConfig, ranks: Ranks, sources: Sequence[TokenSource]) -> MicroBatchReader:
    """The reader of this rank; `sources` are in the order of `GlobalBatch.source`."""
    return MicroBatchReader(
        sources,
        ranks.hdp_rank,
        pack_multiple(config, ranks.device),
        ranks.device,
        ranks.axis,
        tuple(windows(config.model)),
        config.planner.chunk_cache == "host",
    )
