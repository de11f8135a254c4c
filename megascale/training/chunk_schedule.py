"""Forward and backward passes in the order of a plan with chunks.

megatron-core's schedules run backward passes first in, first out. The chunks of a wave run backward
in reverse order, so plans with chunks have a schedule of their own. On CUDA all pipelines train in
it, since it sends no shapes. It takes the place of megatron-core's and has its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import (
    custom_backward,
    deallocate_output_tensor,
    forward_step,
)
from megatron.core.utils import get_model_config

from megascale.mesh.packing import MicroBatch
from megascale.planner.chunk_order import pipeline_order, stage_order
from megascale.training.stage_messages import StageMessages, messages_of


def run_chunks(
    waves: Sequence[int],
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[MicroBatch],
    model: Sequence[torch.nn.Module],
    num_microbatches: int,
    **_: Any,
) -> list[Any]:
    """Run waves of `waves` chunks forward and backward, in the order of `stage_order`.

    Returns what `forward_step_func` reports of each micro-batch, on the last stage. Gradients are
    reduced after the last backward pass at the earliest, as with megatron-core's schedules.
    """
    (chunk,) = model
    passes = _Passes(forward_step_func, _Batches(data_iterator), chunk, waves)
    order = stage_order(waves, passes.stages, passes.stage)
    with ExitStack() as unreduced:
        unreduced.enter_context(passes.config.no_sync_func())
        for number, (backward, index) in enumerate(order):
            if number == len(order) - 1:
                unreduced.close()
            if backward:
                passes.backward(index)
            else:
                passes.forward(index)
    passes.messages.finish()
    return passes.reports


class _Batches(Iterator[MicroBatch]):
    """Micro-batches in order; the shapes of messages ask for some before their turn."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches
        self._tokens: list[int] = []
        self._ahead: list[MicroBatch] = []

    def __next__(self) -> MicroBatch:
        if not self._ahead:
            self._read()
        return self._ahead.pop(0)

    def tokens(self, index: int) -> int:
        """Tokens of a micro-batch, padding included."""
        while len(self._tokens) <= index:
            self._read()
        return self._tokens[index]

    def _read(self) -> None:
        batch = next(self._batches)
        self._ahead.append(batch)
        self._tokens.append(len(batch.tokens_T))


class _Passes:
    """The passes of this stage, and what they keep for each other."""

    def __init__(
        self,
        forward_step_func: Callable[..., Any],
        batches: _Batches,
        chunk: torch.nn.Module,
        waves: Sequence[int],
    ) -> None:
        self.config = get_model_config(chunk)
        self.reports: list[Any] = []
        self._forward, self._batches, self._chunk = forward_step_func, batches, chunk
        self._count = sum(waves)
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self._is_first, self._is_last = self.stage == 0, self.stage == self.stages - 1
        passes = pipeline_order(tuple(waves), self.stages)
        messages = messages_of(passes, self.stages, self.stage)
        self.messages = StageMessages(messages, self.config, self._shape)
        self._kept: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def forward(self, index: int) -> None:
        """Run a micro-batch forward, on the activations of the stage before."""
        given = self.messages.receive(False, index) if not self._is_first else None
        output, _tokens = forward_step(
            self._forward,
            self._batches,
            self._chunk,
            self._count,
            given,
            self.reports,
            self.config,
            cp_group_size=1,
            is_first_microbatch=index == 0,
            current_microbatch=index,
            is_last_stage=self._is_last,
        )
        self._kept[index] = given, output
        if not self._is_last:
            self.messages.send(False, index, output.detach())
            deallocate_output_tensor(output, deallocate_pipeline_outputs=True)

    def backward(self, index: int) -> None:
        """Run a micro-batch backward, on the gradients of the stage after."""
        gradient = self.messages.receive(True, index) if not self._is_last else None
        given, output = self._kept.pop(index)
        custom_backward(output, gradient)  # torch's wants the data of the output, which is gone
        if given is not None:
            assert given.grad is not None, "the output depends on what the stage was given"
            self.messages.send(True, index, given.grad)

    def _shape(self, index: int) -> tuple[int, int, int]:
        """Of activations and their gradients between stages."""
        tokens = self._batches.tokens(index)
        if self.config.sequence_parallel:
            tokens //= self.config.tensor_model_parallel_size
        return tokens, 1, self.config.hidden_size
