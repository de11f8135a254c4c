"""What is known of a step when its row of metrics is written, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megascale.arrays import Floats
from megascale.config import RunConfig
from megascale.corpus.batches import Cursor, GlobalBatch, used_sources
from megascale.corpus.sources import SourceInfo
from megascale.model.counts import batch_flops
from megascale.monitor.device import mfu
from megascale.planner import StepPlan

if TYPE_CHECKING:
    from megascale.model.balance import ExpertUse


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean loss per token, nats."""
    num_tokens: int
    """Loss tokens of the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate of this step."""
    skipped: bool
    """Loss or gradient norm was not finite, or the loss too high: the weights were left alone."""
    stop: bool
    """Some rank was asked to stop."""
    writes_done: bool
    """Every rank has finished its background checkpoint write, if one is pending."""
    seconds: float
    """Wall time of the step on this rank."""
    offload_gib: float
    """Activations that were copied to host memory, all ranks together."""
    experts: ExpertUse | None
    """What the routers chose; None without experts."""


@dataclass(frozen=True)
class StepRecord:
    """A step of a run, as rank 0 knows it; S: sources."""

    config: RunConfig
    cursor: Cursor
    """After the step."""
    batch: GlobalBatch
    plan: StepPlan
    plan_wait_s: float
    """Seconds the training loop waited for the plan."""
    result: StepResult
    world: int
    """Ranks."""
    peak_flops: float | None
    """Of the device of a rank, per second; None where it is not known."""
    bytes_per_token_S: Floats
    """Of the text of each source; NaN where a source does not know its bytes."""
    static_s: float | None = None
    """Predicted seconds of static context parallelism; None where there is no such plan."""

    @property
    def experts(self) -> ExpertUse:
        """What the routers chose; of a model with experts."""
        assert self.result.experts is not None, "the model has no experts"
        return self.result.experts

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s utilisation; None where the peak of the device is not known."""
        tensor = self.config.parallel.tensor
        flops = batch_flops(self.config.model, self.batch.length, tensor)
        return mfu(flops, self.result.seconds, self.world, self.peak_flops)

    @property
    def speedup_over_static(self) -> float | None:
        """Predicted seconds of static context parallelism over those of the plan."""
        if self.static_s is None or not self.plan.predicted_s:
            return None
        return self.static_s / self.plan.predicted_s

    @property
    def replays(self) -> bool:
        """Whether the run reads what earlier runs have read."""
        sources = self.config.data.sources
        return any(sources[name].replay for name in used_sources(self.config.data.stages))

    @property
    def replayed(self) -> float:
        """Part of the run's tokens so far that earlier runs had read already."""
        return replayed_share(self.cursor, self.config)

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits over the bytes of the text; None where a source does not know them."""
        num_bytes = bytes_of(self.batch, self.bytes_per_token_S)
        if not num_bytes:
            return None
        return self.result.loss * self.batch.num_tokens / math.log(2) / num_bytes


def replayed_share(cursor: Cursor, config: RunConfig) -> float:
    """`StepRecord.replayed` at a place of a run."""
    old = [name for name, source in config.data.sources.items() if source.replay]
    again = sum(cursor.sources[name].tokens for name in old if name in cursor.sources)
    return again / max(1, cursor.tokens_seen)


def bytes_per_token(sources: Iterable[SourceInfo]) -> Floats:
    """Of the text of each source; NaN where it does not know its bytes."""
    return np.array(
        [
            math.nan if one.train_bytes is None else one.train_bytes / max(one.train_tokens, 1)
            for one in sources
        ]
    )


def bytes_of(batch: GlobalBatch, per_token: Floats) -> float | None:
    """Bytes of text that a batch holds, by the means of its sources; None where one is unknown."""
    num_bytes = float(per_token[batch.source] @ batch.length)
    return None if math.isnan(num_bytes) else num_bytes
