"""Held-out loss and bits per byte per source, during and after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from megascale.corpus.batches import GlobalBatch
from megascale.corpus.describe import SourceInfo
from megascale.corpus.pieces import Pieces, heldout_pieces
from megascale.corpus.shards import Shard
from megascale.errors import UserError
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.balance import ExpertUse
from megascale.model.build import pack_multiple
from megascale.planner.plan import StepPlan
from megascale.runtime.together import from_first_rank
from megascale.train.earlier import PREFIX
from megascale.train.step import Learner, evaluate, look


@dataclass(frozen=True)
class HeldoutScore:
    """How well the model predicts the held-out documents of one source."""

    loss: float
    """Mean loss per token, nats."""
    bits_per_byte: float | None
    """Summed loss in bits over the bytes of the same documents that their ids give back; None
    where the source does not know its bytes (a bare Megatron prefix)."""
    tokens: int
    """Tokens judged."""


@dataclass(frozen=True)
class HeldoutSet:
    """The held-out documents of one source, planned once and read at every evaluation."""

    reader: MicroBatchReader
    batch: GlobalBatch
    plan: StepPlan
    num_bytes: int | None

    def score(self, learner: Learner) -> HeldoutScore:
        """Run the whole set, without gradients, over all ranks."""
        count = len(self.plan.rings_of(self.reader.hdp_rank))
        micro_batches = self.reader.read(self.plan, self.batch)
        loss_sum, tokens = evaluate(learner, micro_batches, count)
        bits = loss_sum / math.log(2)
        return HeldoutScore(
            loss=loss_sum / tokens,
            bits_per_byte=bits / self.num_bytes if self.num_bytes else None,
            tokens=tokens,
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
    for name, info in sources.items():
        plain = sources.get(name.removeprefix(PREFIX))
        twice = plain is not None and plain is not info and plain.heldout == info.heldout
        if info.heldout is None or not config.eval.tokens or twice:
            continue
        shard = Shard.open(info.heldout)
        pieces = heldout_pieces(shard, config.data.context_tokens, config.eval.tokens)
        if not len(pieces.length):
            continue
        payload = from_first_rank(ranks, partial(_plan_bytes, planner, pieces))
        source = TokenSource(name, shard, info.first_id, config.model.vocab_size or 0)
        sets[name] = HeldoutSet(
            reader=MicroBatchReader(
                [source], ranks.hdp_rank, pack_multiple(config), ranks.device, ranks.axis
            ),
            batch=_as_batch(pieces),
            plan=StepPlan.from_bytes(payload),
            num_bytes=_bytes_of(info, pieces),
        )
    return sets


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


def _bytes_of(info: SourceInfo, pieces: Pieces) -> int | None:
    if info.heldout_bytes is None:
        return None
    try:
        sizes = np.load(info.heldout_bytes, mmap_mode="r", allow_pickle=False)
        return int(sizes[np.unique(pieces.document)].sum())
    except (OSError, ValueError, IndexError):
        raise UserError(f"{info.heldout_bytes} is damaged; prepare the corpus again") from None
