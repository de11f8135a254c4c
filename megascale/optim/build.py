"""The optimizer of a run: megatron-core's, with the learning rate set from outside."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from megascale.config import RunConfig
from megascale.model.model import Model
from megascale.optim.fused import SMALLEST_NORM, TORCH_ADAM, fuse, is_fused, step_on_device
from megascale.optim.optimizer_kind import StateTensors, find_optimizer


@dataclass(frozen=True, eq=False)
class Optimizer:
    """An optimizer on this rank."""

    core: Any
    """megatron-core's; it may be a chain of others."""
    state: StateTensors
    """What it keeps."""
    readers: list[Any] = field(default_factory=list)
    """Events on the device after which weights and state may change: copies that are on the way."""

    @property
    def inner(self) -> list[Any]:
        """megatron-core's optimizers that hold parameters on this rank."""
        chained = getattr(self.core, "chained_optimizers", [self.core])
        return [inner for inner in chained if not getattr(inner, "is_stub_optimizer", False)]

    def await_readers(self) -> None:
        """Let the device, not the host, wait for all `readers` before what comes next."""
        while self.readers:
            self.readers.pop().wait()

    @property
    def steps(self) -> int:
        """Steps that it took; 0 before the first."""
        counts: list[Any] = [0]
        for inner in self.inner:
            for group in inner.optimizer.param_groups:
                counts.append(group.get("step", 0))
                states = [inner.optimizer.state.get(p, {}) for p in group["params"]]
                counts += [state.get("step", 0) for state in states]
        tensors = [count for count in counts if isinstance(count, torch.Tensor)]
        numbers = [count for count in counts if not isinstance(count, torch.Tensor)]
        if tensors:  # they may be on a device, which is asked once
            numbers.append(torch.stack(tensors).max().item())
        return int(max(numbers))

    def set_steps(self, steps: int) -> None:
        """Make the state where there is none (Adam makes it in its first step), and set the count
        that bias correction goes by. torch's Adam counts per parameter, all others per group."""
        for inner in self.inner:
            inner.init_state_fn(inner.optimizer, inner.config)
            per_parameter = isinstance(inner.optimizer, TORCH_ADAM)
            for group in inner.optimizer.param_groups:
                if not per_parameter:
                    group["step"] = steps
                    continue
                for parameter in group["params"]:
                    device = parameter.device if group["fused"] else "cpu"
                    count = torch.full((), float(steps), device=device)
                    inner.optimizer.state[parameter]["step"] = count


def build_optimizer(config: RunConfig, model: Model) -> Optimizer:
    """The optimizer that `optim.name` names, for the weights of `model`.

    Clipping is left to `apply_gradients`, which folds it into the one scaling of gradients.
    """
    from megatron.core.optimizer import OptimizerConfig

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
    kind = find_optimizer(optim.name)
    optimizer = Optimizer(kind.build(config, options, model), kind.state)
    if next(model.parameters()).is_cuda:
        fuse(optimizer.inner)
    return optimizer


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Give every parameter group its rate and decay; norms carry a decay factor of 0."""
    for group in optimizer.core.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


@torch.no_grad()
def apply_gradients(
    model: Model,
    optimizer: Optimizer,
    loss_tokens: int,
    clip_grad_norm: float,
    good_loss: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the summed gradients by the loss tokens of the global batch, clip, and step.

    Returns the gradient norm before clipping and whether the step was taken, both on the device of
    `good_loss`; without a good loss, or with a norm that is not finite, nothing is changed. Every
    rank reaches the same verdict, because the norm is reduced over all of them. The host waits for
    the device unless the optimizer is fused.
    """
    core = optimizer.core
    optimizer.await_readers()
    core.prepare_grads()
    if is_fused(optimizer.inner):
        return step_on_device(core, optimizer.inner, loss_tokens, clip_grad_norm, good_loss)
    norm = float(core.get_grad_norm()) / loss_tokens
    stepped = bool(good_loss) and math.isfinite(norm)
    if stepped:
        clip = min(1.0, clip_grad_norm / (norm + SMALLEST_NORM)) if clip_grad_norm else 1.0
        model.scale_gradients(clip / loss_tokens)
        core.step_with_ready_grads()
    verdict = torch.full_like(good_loss, stepped)
    return torch.full_like(good_loss, norm, dtype=torch.float64), verdict
