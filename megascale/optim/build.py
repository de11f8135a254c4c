"""AdamW or SOAP through megatron-core's optimizers, with the learning rate set from outside."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from megascale.config import RunConfig
from megascale.model.model import Model


def build_optimizer(config: RunConfig, model: Model) -> Any:
    """megatron-core's optimizer for the weights of `model`.

    Clipping is left to `apply_gradients`, which folds it into the one scaling of gradients.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optim, bf16 = config.optim, config.train.precision == "bf16"
    reduction = model.chunks[0].ddp_config
    options = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=reduction.use_distributed_optimizer,
        overlap_param_gather=reduction.overlap_param_gather,
    )
    if optim.name == "adamw":
        return get_megatron_optimizer(options, model.chunks, use_gloo_process_groups=False)
    from megascale.optim.whole import whole_weights

    # without bf16 it makes neither state nor master weights: its parameter groups are wanted
    grouped = get_megatron_optimizer(
        replace(options, bf16=False), model.chunks, use_gloo_process_groups=False
    )
    return whole_weights(config, options, model, grouped)


def set_rates(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Give every parameter group its rate and decay; norms carry a decay factor of 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


@torch.no_grad()
def apply_gradients(
    model: Model, optimizer: Any, loss_tokens: int, clip_grad_norm: float, good_loss: bool
) -> tuple[float, bool]:
    """Divide the summed gradients by the loss tokens of the global batch, clip, and step.

    Returns the gradient norm before clipping and whether the step was taken; without a good loss,
    or with a norm that is not finite, nothing is changed. Every rank reaches the same verdict,
    because the norm is reduced over all of them.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm()) / loss_tokens
    if not good_loss or not math.isfinite(norm):
        return norm, False
    clip = min(1.0, clip_grad_norm / (norm + 1e-6)) if clip_grad_norm else 1.0
    model.scale_gradients(clip / loss_tokens)
    optimizer.step_with_ready_grads()
    return norm, True
