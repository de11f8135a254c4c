"""The stages of a pipeline whose passes take given times, in the place of a model.

All else is real: ranks, micro-batches, the schedule, its messages, and the ranks of a ring that
wait for each other. Passes sleep, or they count on clocks that the messages carry, which no busy
machine can disturb.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from megascale.mesh.in_memory import micro_batches
from megascale.mesh.packing import MicroBatch, TokenSequence
from megascale.mesh.ring_attention import ring_sum
from megascale.planner import CostModel, StepPlan
from megascale.planner.chunk_order import chunks_of_waves
from megascale.planner.cost import FORWARD_SHARE
from megascale.planner.timeline import ring_seconds
from megascale.runtime.distributed import Ranks


class TimedStage(torch.nn.Module):
    """What one rank runs of one plan."""

    def __init__(self, config: Any, ranks: Ranks, seconds: Sequence[float], sleeps: bool) -> None:
        """`config` is megatron-core's; `seconds` of each micro-batch, forward and backward."""
        super().__init__()
        self.config = config
        self.clock_s = 0.0
        """When this rank is done with what it ran so far."""
        self._seconds, self._sleeps, self._ranks = seconds, sleeps, ranks
        self._given: torch.Tensor | None = None
        self._count = 0
        self._anchor = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def set_input_tensor(self, given: list[torch.Tensor | None]) -> None:
        """Take what the stage before sent, as megatron-core gives it."""
        (self._given,) = given

    def step(
        self, batches: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Any]:
        """A forward pass; what megatron-core calls a forward step function."""
        del chunk
        batch = next(batches)
        index, self._count = self._count, self._count + 1
        given = self._anchor if self._given is None else self._given
        shape = (len(batch.tokens_T), 1, self.config.hidden_size)
        output = _Pass.apply(given, self, index, batch, shape, self._given is not None)

        def report(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            return loss.sum(), torch.ones((), dtype=torch.int32), None

        return output, report

    def run(self, index: int, batch: MicroBatch, share: float, arrived_s: float) -> None:
        """One pass, of that share of the micro-batch's seconds, on what arrived then."""
        begin_s = max(self.clock_s, arrived_s)
        ring = batch.segments.ring
        if ring is not None and ring.size > 1:
            ready = torch.zeros(ring.size, dtype=torch.float64)
            ready[ring.place] = begin_s
            begin_s = float(ring_sum(ready, ring).max())
        if self._sleeps:
            time.sleep(share * self._seconds[index])
        self.clock_s = begin_s + share * self._seconds[index]


class _Pass(torch.autograd.Function):
    """Passes of a micro-batch, whose activations and gradients hold the clock."""

    @staticmethod
    def forward(ctx, given, stage, index, batch, shape, has_arrived):  # type: ignore[no-untyped-def]
        stage.run(index, batch, FORWARD_SHARE, float(given.max()) if has_arrived else 0.0)
        ctx.of, ctx.shape = (stage, index, batch), given.shape
        return torch.full(shape, stage.clock_s, dtype=torch.float64)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        stage, index, batch = ctx.of
        is_last = stage._ranks.is_last_stage
        stage.run(index, batch, 1 - FORWARD_SHARE, 0.0 if is_last else float(grad.max()))
        clock = torch.full(ctx.shape, stage.clock_s, dtype=torch.float64)
        return clock, None, None, None, None, None


def run_plan(
    plan: StepPlan, lengths: Sequence[int], cost: CostModel, ranks: Ranks, config: Any, sleeps: bool
) -> tuple[float, float]:
    """Run a plan with chunks on this rank; seconds of this rank by the clock, and as they were.

    `config` is megatron-core's of a model in fp64 (see `transformer_config`).
    """
    from megascale.training.chunk_schedule import run_chunks

    config.pipeline_dtype, config.no_sync_func = torch.float64, nullcontext
    rings = plan.rings_of(ranks.hdp_rank)
    seconds = dict(zip((r.id for r in plan.rings), ring_seconds(plan, lengths, cost), strict=True))
    stage = TimedStage(config, ranks, [float(seconds[ring.id]) for ring in rings], sleeps)
    sequences = [TokenSequence(np.zeros(n, np.int64), np.zeros(n, np.int64)) for n in lengths]
    batches = micro_batches(plan, ranks.hdp_rank, sequences, axis=ranks.axis)
    torch.distributed.barrier()
    began = time.perf_counter()
    run_chunks(
        chunks_of_waves(rings),
        forward_step_func=stage.step,
        data_iterator=batches,
        model=[stage],
        num_microbatches=len(rings),
    )
    return stage.clock_s, time.perf_counter() - began
