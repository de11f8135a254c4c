"""An optimizer for tests, in one file as in `megascale/optim`: SGD with a momentum of beta1."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megascale.config import Layout, RunConfig
from megascale.config.optimizers import OptimizerInfo
from megascale.model.matrices import Weight
from megascale.optim.dealing import dealt_bytes
from megascale.optim.optimizer_kind import OptimizerKind, StateTensors

if TYPE_CHECKING:
    from megascale.model.model import Model

INFO = OptimizerInfo(title="Momentum", module="toy_optimizer", lr=0.05, beta1=0.8)
"""What its one line in `OPTIMIZERS` of `megascale/config/optimizers.py` would be."""


class Momentum(torch.optim.Optimizer):
    """m = beta1 m + g; w = w (1 - lr decay) - lr m."""

    def __init__(self, params: Any, beta1: float) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "beta1": beta1, "step": 0})

    def init_state(self) -> None:
        """Zeros where there is nothing."""
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].setdefault("momentum", torch.zeros_like(weight))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight."""
        self.init_state()
        for group in self.param_groups:
            group["step"] += 1
            for weight in group["params"]:
                momentum = self.state[weight]["momentum"].mul_(group["beta1"]).add_(weight.grad)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(momentum, alpha=-group["lr"])


def _weight_bytes(weight: Weight) -> int:
    return 4 * math.prod(weight.shape)


def _build(config: RunConfig, options: Any, model: Model) -> Any:
    from megascale.optim.whole_weights import whole_weights

    make = partial(Momentum, beta1=config.optim.beta1)
    return whole_weights(config, options, model, make, _weight_bytes)


def _state_bytes(config: RunConfig, layout: Layout, stage: int) -> int:
    return dealt_bytes(config, layout, stage, _weight_bytes)


OPTIMIZER = OptimizerKind(_build, _state_bytes, StateTensors(moments=("momentum",)))
