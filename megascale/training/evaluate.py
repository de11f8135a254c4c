"""Held-out loss and bits per byte per source, during and after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from megascale.corpus.batches import GlobalBatch
from megascale.corpus.heldout import HeldoutPart, choose_part
from megascale.corpus.pieces import Pieces
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.balance import ExpertUse
from megascale.planner.plan import StepPlan
from megascale.run.heldout_sets import scored_sources
from megascale.runtime.distributed import Ranks
from megascale.runtime.first_rank import from_first_rank
from megascale.training.reading import reader_of
from megascale.training.step import Learner, evaluate, look


@dataclass(frozen=True)
class HeldoutScore:
    """How well the model predicts the held-out documents of one source."""

    loss: float
    """Mean loss per token, nats."""
    bits_per_byte: float | None
    """Summed loss in bits over the bytes of the same text that its ids give back; None where the
    source does not know its bytes (a bare Megatron prefix)."""
    tokens: int
    """Tokens judged."""
    documents: int
    """Documents of which something was judged."""
    set_tokens: int
    """Tokens of the whole held-out set."""
    set_documents: int
    """Documents of the whole held-out set."""
    part: str
    """Mark of the part of the set that was judged; scores of other parts do not compare."""


@dataclass(frozen=True)
class HeldoutSet:
    """The held-out text of one source, planned once and read at every evaluation."""

    reader: MicroBatchReader
    batch: GlobalBatch
    plan: StepPlan
    part: HeldoutPart

    def score(self, learner: Learner) -> HeldoutScore:
        """Run the whole set, without gradients, over all ranks."""
        count = len(self.plan.rings_of(self.reader.hdp_rank))
        micro_batches = self.reader.read(self.plan, self.batch)
        loss_sum, tokens = evaluate(learner, micro_batches, count)
        bits, part = loss_sum / math.log(2), self.part
        return HeldoutScore(
            loss=loss_sum / tokens,
            bits_per_byte=bits / part.num_bytes if part.num_bytes else None,
            tokens=tokens,
            documents=part.documents,
            set_tokens=part.set_tokens,
            set_documents=part.set_documents,
            part=part.mark,
        )

    def experts(self, learner: Learner) -> ExpertUse:
        """Which experts the whole set uses, over all ranks; of a model that has some."""
        count = len(self.plan.rings_of(self.reader.hdp_rank))
        learner.model.eval()
        use = look(learner, self.reader.read(self.plan, self.batch), count)
        learner.model.train()
        return use


def heldout_sets(
    learner: Learner,
    sources: Mapping[str, SourceInfo],
    planner: Callable[[np.ndarray], StepPlan],
) -> dict[str, HeldoutSet]:
    """The sets of all sources that have held-out documents; empty when `eval.tokens` is 0."""
    config, ranks = learner.config, learner.ranks
    sets: dict[str, HeldoutSet] = {}
    for name, info in scored_sources(config, sources):
        part = _chosen(info, config.data.context_tokens, config.eval.tokens, ranks)
        pieces = part.pieces(config.data.context_tokens)
        if not len(pieces.length):
            continue
        payload = from_first_rank(ranks, partial(_plan_bytes, planner, pieces))
        shard = Shard.open(info.heldout or "")
        source = TokenSource(name, shard, info.first_id, config.model.vocab_size or 0)
        sets[name] = HeldoutSet(
            reader=reader_of(config, ranks, [source]),
            batch=_as_batch(pieces),
            plan=StepPlan.from_bytes(payload),
            part=part,
        )
    return sets


def _chosen(info: SourceInfo, context_tokens: int, tokens: int, ranks: Ranks) -> HeldoutPart:
    """What is scored of a held-out set, chosen by rank 0."""
    payload = from_first_rank(ranks, lambda: choose_part(info, context_tokens, tokens).to_bytes())
    return HeldoutPart.from_bytes(payload)


def _plan_bytes(planner: Callable[[np.ndarray], StepPlan], pieces: Pieces) -> bytes:
    return planner(pieces.length).to_bytes()


def _as_batch(pieces: Pieces) -> GlobalBatch:
    return GlobalBatch(
        step=0,
        source=np.zeros(len(pieces.length), dtype=np.int16),
        document=pieces.document,
        start=pieces.start,
        length=pieces.length.astype(np.int32),
    )
