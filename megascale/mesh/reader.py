"""A rank reads its own tokens: from a plan and a batch to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from megascale.corpus.batches import GlobalBatch
from megascale.corpus.fim import FimReader
from megascale.corpus.shards import Shard
from megascale.errors import RankError
from megascale.mesh.chunk_groups import ChunkGroups
from megascale.mesh.in_memory import packed_part
from megascale.mesh.packing import MicroBatch, TokenSequence
from megascale.mesh.transfer import ahead
from megascale.planner.plan import StepPlan
from megascale.planner.shares import RankMicroBatch
from megascale.runtime.distributed import HdpAxis


@dataclass(frozen=True)
class TokenSource:
    """The shards of one source, and what is needed to read them."""

    name: str
    shard: Shard | FimReader
    first_id: int
    """The input before the first token of every document: its beginning-of-text id, or the id that
    ends documents. A piece from the middle of a document has the token before it."""
    vocab_size: int
    """Ids at or above it are a fault of the data."""

    def read(self, document: int, start: int, length: int) -> TokenSequence:
        """Targets `start` to `start + length` of `document`, and the inputs one before each.

        Raises RankError for an id outside the vocabulary.
        """
        first = max(start - 1, 0)
        tokens = self.shard.read(document, first, start + length - first).astype(np.int64)
        if start == 0:
            tokens = np.concatenate([[self.first_id], tokens])
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            bad = tokens.max() if tokens.max() >= self.vocab_size else tokens.min()
            raise RankError(
                f"source '{self.name}' ({self.shard.prefix}): document {document} holds token "
                f"{bad}, outside the vocabulary of {self.vocab_size}; run megascale data check, "
                "or raise model.vocab_size"
            )
        return TokenSequence(tokens[:-1], tokens[1:])


@dataclass(frozen=True)
class MicroBatchReader:
    """Makes the micro-batches of one position on the HDP axis."""

    sources: Sequence[TokenSource]
    """In the order of `GlobalBatch.source`."""
    hdp_rank: int
    multiple: int = 1
    """Micro-batches are padded to a multiple of this many tokens."""
    device: torch.device = torch.device("cpu")
    axis: HdpAxis | None = None
    """How ranks that share sequences reach one another; None where no ring has two."""
    windows: Sequence[int | None] = (None,)
    """The windows of attention in the layers of the model, each once; None: a layer without one."""
    keeps_chunks_on_host: bool = False
    """Keys and values of chunks wait in host memory for later chunks."""

    def read(self, plan: StepPlan, batch: GlobalBatch) -> Iterator[MicroBatch]:
        """This rank's micro-batches in plan order. On CPU each is read from disk when the caller
        asks for it. On CUDA a thread reads them in advance and starts their copies to the device.
        """
        batches = self._read(plan, batch)
        return ahead(batches, self.device) if self.device.type == "cuda" else batches

    def _read(self, plan: StepPlan, batch: GlobalBatch) -> Iterator[MicroBatch]:
        part, pad_id = partial(self._part, batch), self.sources[0].first_id
        groups = ChunkGroups(self.keeps_chunks_on_host)
        for ring in plan.rings_of(self.hdp_rank):
            mine = RankMicroBatch.of(ring, self.hdp_rank, batch.length)
            sources = [int(batch.source[i]) for i in ring.sequences]
            given = (self.device, self.axis, self.multiple, pad_id, groups, sources, self.windows)
            yield packed_part(mine, part, *given)

    def _part(
        self, batch: GlobalBatch, index: int, spans: Sequence[tuple[int, int]]
    ) -> TokenSequence:
        """The given (start, tokens) of one sequence of the batch, joined."""
        source, begin = self.sources[batch.source[index]], int(batch.start[index])
        document = int(batch.document[index])
        parts = [source.read(document, begin + start, tokens) for start, tokens in spans]
        if len(parts) == 1:
            return parts[0]
        nothing = np.empty(0, dtype=np.int64)
        return TokenSequence(
            np.concatenate([nothing, *(part.inputs for part in parts)]),
            np.concatenate([nothing, *(part.targets for part in parts)]),
        )
