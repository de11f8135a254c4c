"""One training step on one screen, and the forward and backward passes it stands on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megascale.config import RunConfig
from megascale.mesh.packing import MicroBatch
from megascale.model.balance import ExpertUse
from megascale.model.build import pack_multiple
from megascale.model.model import Model
from megascale.monitor.step_record import StepResult
from megascale.optim.build import apply_gradients, set_rates
from megascale.optim.schedule import lr_at
from megascale.runtime.distributed import Ranks
from megascale.runtime.heartbeat import pulse
from megascale.training.chunk_schedule import run_chunks


@dataclass
class Learner:
    """The model and its optimizer on this rank."""

    config: RunConfig
    ranks: Ranks
    model: Model
    optimizer: Any
    """An `optim.build.Optimizer`; None where nothing is trained."""


def train_step(
    learner: Learner,
    micro_batches: Iterable[MicroBatch],
    count: int,
    loss_tokens: int,
    tokens_seen: int,
    most_loss: float = math.inf,
    stop: bool = False,
    writes_done: bool = True,
    waves: Sequence[int] = (),
    overlap: bool = False,
) -> StepResult:
    """Train on one global batch, of which `micro_batches` (`count` of them) are this rank's.

    `waves` says how many chunks each wave has, where the plan has chunks.
    `loss_tokens` are those of the whole batch and `tokens_seen` those up to and including it.
    With a mean loss above `most_loss`, or one that is not finite, the weights are left alone.
    With `overlap`, equal on all ranks, gradients are reduced during the last backward pass; see
    `StepPlan.ends_without_rings`. Raises RuntimeError when the ranks together did not run every
    token exactly once.
    """
    began = time.perf_counter()
    model, optimizer, optim = learner.model, learner.optimizer, learner.config.optim
    lr = lr_at(tokens_seen, optim.schedule)
    set_rates(optimizer, lr, optim.weight_decay)
    _begin_step(learner, loss_tokens, overlap)
    balance = model.balance
    if balance is not None:
        if balance.looks_first:
            micro_batches = list(micro_batches)
            balance.adopt(look(learner, micro_batches, count))
        balance.begin(count, loss_tokens)
    pulse.enter("micro-batches")
    sums = run_micro_batches(learner, micro_batches, count, waves=waves)
    pulse.enter("gradients")
    if balance is not None:
        balance.begin_sum()
    finalize_model_grads(model.chunks)
    moved_gib = model.offloader.take_traffic().moved_bytes / 2**30
    sums = _sum_over_ranks(sums, float(stop), float(not writes_done), moved_gib)
    pulse.enter("optimizer")
    loss_sum, ran = sums[:2]
    good_loss = loss_sum.isfinite() & (loss_sum <= most_loss * loss_tokens) & (ran == loss_tokens)
    update = apply_gradients(model, optimizer, loss_tokens, optim.clip_grad_norm, good_loss)
    model.gathers.begin()
    loss, ran, stops, writing, moved_gib, norm, stepped = _read(*sums, *update)
    if int(ran) != loss_tokens:
        raise RuntimeError(f"the plan ran {int(ran)} tokens of a batch of {loss_tokens}")
    experts = balance.finish_sum() if balance is not None else None
    if balance is not None and experts is not None and stepped:
        balance.adopt(experts)
    return StepResult(
        loss=loss / loss_tokens,
        num_tokens=loss_tokens,
        grad_norm=norm,
        lr=lr,
        skipped=not stepped,
        stop=stops > 0,
        writes_done=writing == 0,
        seconds=time.perf_counter() - began,
        offload_gib=moved_gib,
        experts=experts,
    )


def _begin_step(learner: Learner, loss_tokens: int, overlap: bool) -> None:
    """Set gradients to zero, and what the step does with layers that open and with reductions."""
    for layer in learner.model.masked_layers:
        layer.open_by(loss_tokens)
    learner.model.zero_grad_buffer()
    learner.model.overlap_reductions(overlap)
    learner.optimizer.core.zero_grad()


def look(learner: Learner, micro_batches: Iterable[MicroBatch], count: int) -> ExpertUse:
    """What the routers choose over all ranks' micro-batches, without gradients."""
    balance = learner.model.balance
    assert balance is not None, "the model has experts"
    with balance.looking(), torch.no_grad():
        run_micro_batches(learner, micro_batches, count, forward_only=True)
    balance.begin_sum()
    return balance.finish_sum()


def evaluate(
    learner: Learner, micro_batches: Iterable[MicroBatch], count: int
) -> tuple[float, int]:
    """Summed loss (nats) and tokens over all ranks, without gradients."""
    learner.model.eval()
    with torch.no_grad():
        sums = run_micro_batches(learner, micro_batches, count, forward_only=True)
    learner.model.train()
    loss_sum, ran = _read(*_sum_over_ranks(sums))
    return loss_sum, int(ran)


def run_micro_batches(
    learner: Learner,
    micro_batches: Iterable[MicroBatch],
    count: int,
    forward_only: bool = False,
    waves: Sequence[int] = (),
) -> torch.Tensor:
    """Forward (and backward) through megatron-core's schedule for this layout.

    Waves of chunks run backward in the order of the plan, by `chunk_schedule`. So do all waves of a
    pipeline on CUDA: megatron-core's schedule sends shapes first, and waits for each.
    Returns this rank's (summed loss, loss tokens), fp64 on its device, both 0 where another rank
    reports them. The host does not wait for the device.
    """
    device = learner.ranks.device
    learner.model.gathers.begin()
    pipeline = learner.config.parallel.pipeline > 1 and device.type == "cuda"
    in_order = not forward_only and (pipeline or any(chunks > 1 for chunks in waves))
    schedule = get_forward_backward_func()
    if in_order:
        schedule = partial(run_chunks, waves or [1] * count)
    reports = schedule(
        forward_step_func=partial(_forward, learner.model),
        data_iterator=iter(micro_batches),
        model=learner.model.chunks,
        num_microbatches=count,
        seq_length=pack_multiple(learner.config, device),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if not learner.ranks.reports_loss:
        return torch.zeros(2, dtype=torch.float64, device=device)
    return torch.stack(reports).sum(dim=0)


def _forward(
    model: Model, data: Iterator[MicroBatch], chunk: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    model.timer.micro_batch()
    pulse.mark()
    with model.offloader.micro_batch(batch.offload):
        output = chunk(
            input_ids=batch.tokens_T[None],
            position_ids=batch.segments.positions_T[None],
            attention_mask=None,
            labels=batch.targets_T[None],
            loss_mask=batch.loss_mask_T[None],
            packed_seq_params=batch.segments,
        )
    if not torch.is_grad_enabled():
        batch.segments.end_group()

    def report(loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = torch.full((), batch.num_tokens, dtype=torch.int32, device=loss_sum.device)
        return loss_sum, tokens, torch.stack([loss_sum.detach().double(), tokens.double()])

    return output, report


def _sum_over_ranks(sums: torch.Tensor, *values: float) -> torch.Tensor:
    """`sums` of all ranks, and each of `values`, which are in host memory."""
    total = torch.cat([sums, *(torch.full_like(sums[:1], value) for value in values)])
    dist.all_reduce(total)
    return total


def _read(*values: torch.Tensor) -> list[float]:
    """Numbers on the device; on a GPU it is here that this process waits, once in a step."""
    with pulse.waiting():
        read: list[float] = torch.stack([value.double() for value in values]).tolist()
        return read
