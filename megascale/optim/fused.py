"""A step that the device decides on by itself, with torch's fused Adam.

The kernel takes a factor of the gradients and a flag that says to leave everything alone, both as
tensors on the device (they are meant for loss scaling). So the host need not know the norm of the
gradients before it launches the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)
SMALLEST_NORM = 1e-6
"""Added to a norm that is divided by."""


def fuse(inner: Sequence[Any]) -> None:
    """Let torch's own Adam, in megatron-core's optimizers `inner`, update all weights of a group in
    one kernel. Others, such as that of Transformer Engine, stay as they are."""
    for one in inner:
        if isinstance(one.optimizer, TORCH_ADAM):
            for group in (one.optimizer.defaults, *one.optimizer.param_groups):
                group["fused"] = True


def is_fused(inner: Sequence[Any]) -> bool:
    """Whether all of these optimizers are; the same on all ranks, each of which has weights.

    The groups of other optimizers may have an option `fused` with another meaning.
    """
    return bool(inner) and all(
        isinstance(one.optimizer, TORCH_ADAM)
        and all(group["fused"] is True for group in one.optimizer.param_groups)
        for one in inner
    )


def step_on_device(
    core: Any,
    inner: Sequence[Any],
    loss_tokens: int,
    clip_grad_norm: float,
    good_loss: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `optim.build.apply_gradients` does, without a wait of the host.

    `core` is megatron-core's optimizer, whose gradients are ready, and `inner` those of its parts
    that hold parameters. All of them must be fused.
    """
    norm = gradient_norm(core, good_loss.device) / loss_tokens
    stepped = good_loss & norm.isfinite()
    divisor = torch.full_like(norm, loss_tokens)
    if clip_grad_norm:
        divisor = divisor / (clip_grad_norm / (norm + SMALLEST_NORM)).clamp(max=1)
    for one in inner:
        one.optimizer.grad_scale = divisor.float()
        one.optimizer.found_inf = stepped.logical_not().float()
    core.step_with_ready_grads()
    for one in inner:
        del one.optimizer.grad_scale, one.optimizer.found_inf
    return norm, stepped


def gradient_norm(core: Any, device: torch.device) -> torch.Tensor:
    """The norm of all gradients of all ranks, fp64 on the device.

    A chain of optimizers may reduce over several groups: each has its own part of the weights.
    """
    gradients: dict[Any, list[torch.Tensor]] = {}
    for one in getattr(core, "chained_optimizers", [core]):
        group = one.get_grad_stats_parallel_group()
        gradients.setdefault(group, []).extend(one.get_main_grads_for_grad_norm())
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group, grads in gradients.items():
        square = torch.zeros_like(total)
        if grads:
            square += torch.stack(torch._foreach_norm(grads)).double().square().sum()
        dist.all_reduce(square, group=group)
        total += square
    return total.sqrt()
