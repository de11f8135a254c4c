"""A rank reads its own tokens: from a plan and a batch to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megascale.corpus.batches import GlobalBatch
from megascale.corpus.shards import Shard
from megascale.errors import RankError
from megascale.mesh.packing import MicroBatch, TokenSequence, pack
from megascale.planner.plan import StepPlan


@dataclass(frozen=True)
class TokenSource:
    """The shards of one source, and what is needed to read them."""

    name: str
    shard: Shard
    eod_id: int
    """Ends every document, and stands before the first token of each as its input."""
    vocab_size: int
    """Ids at or above it are a fault of the data."""

    def read(self, document: int, start: int, length: int) -> TokenSequence:
        """Targets `start` to `start + length` of `document`, and the inputs one before each.

        Raises RankError for an id outside the vocabulary.
        """
        first = max(start - 1, 0)
        tokens = self.shard.read(document, first, start + length - first).astype(np.int64)
        if start == 0:
            tokens = np.concatenate([[self.eod_id], tokens])
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
    multiple: int
    """Micro-batches are padded to a multiple of this many tokens."""
    device: torch.device

    def read(self, plan: StepPlan, batch: GlobalBatch) -> Iterator[MicroBatch]:
        """This rank's micro-batches in plan order, each read from disk when it is asked for."""
        for ring in plan.rings_of(self.hdp_rank):
            sequences = [
                self.sources[batch.source[i]].read(
                    int(batch.document[i]), int(batch.start[i]), int(batch.length[i])
                )
                for i in ring.sequences
            ]
            packed = pack(sequences, self.sources[0].eod_id, self.multiple, self.device)
            yield replace(packed, offload=ring.offload)
