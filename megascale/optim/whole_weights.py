"""An optimizer of whole weights behind megatron-core's interface, its state dealt out by weights.

The distributed optimizer cuts flattened weights into ranges, and such an optimizer needs matrices.
So gradients are reduced to every rank, each weight is updated by the one rank of the HDP axis that
keeps its state, and sent to the others. (megatron-core's layer-wise optimizer is made so too, but
differs between its versions, and in the older one sends nothing in the steps that `apply_gradients`
takes.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from megascale.config import RunConfig
from megascale.model.matrices import FUSED_NAME, Weight
from megascale.model.model import Model
from megascale.optim.dealing import StateBytes, deal, kept_bytes

Make = Callable[[list[dict[str, Any]]], Any]
"""Makes a torch optimizer of parameter groups. It counts its steps in `step` of each group, and its
`init_state()` makes the state where there is none. A weight of a group with `fused` = 2 is two
matrices on top of each other."""


class WholeWeights(ChainedOptimizer):  # type: ignore[misc]
    """Optimizers of the weights that this rank keeps; a step ends with sending all weights."""

    def __init__(self, inner: list[Any], sent: list[tuple[torch.Tensor, int, Any]]) -> None:
        super().__init__(inner)
        self._sent = sent
        """(weight, rank that updates it, group of the ranks that hold it), the same order on all
        ranks of a group."""

    def step_with_ready_grads(self) -> bool:
        """Update, then send every weight from the rank that updated it."""
        done = bool(super().step_with_ready_grads())
        sending = [
            dist.broadcast(weight.data, source, group, async_op=True)
            for weight, source, group in self._sent
        ]
        for work in sending:
            work.wait()
        return done


def whole_weights(
    config: RunConfig, options: OptimizerConfig, model: Model, make: Make, state_bytes: StateBytes
) -> Any:
    """What `make` makes, for the weights of `model`.

    With `optim.distributed_optimizer` a rank keeps the weights dealt to it, by the bytes of their
    state, else all of them.
    """
    # without bf16 it makes neither state nor master weights: its parameter groups are wanted
    grouped = get_megatron_optimizer(
        replace(options, bf16=False), model.chunks, use_gloo_process_groups=False
    )
    fused = {id(w) for name, w in model.named_parameters() if FUSED_NAME in name}
    inner, sent = [], []
    for theirs in grouped.chained_optimizers:
        weights = [weight for group in theirs.param_groups for weight in group["params"]]
        kept = {id(weight) for weight in weights}
        if config.optim.distributed_optimizer:
            sources = _sources(config, weights, fused, state_bytes)
            kept = {id(weight) for weight, source, _ in sources if source == dist.get_rank()}
            sent += sources
        groups = [part for group in theirs.param_groups for part in _split(group, kept, fused)]
        inner.append(_wrapped(config, options, make(groups), theirs))
    return WholeWeights(inner, sent)


def _sources(
    config: RunConfig, weights: list[torch.Tensor], fused: set[int], state_bytes: StateBytes
) -> list[tuple[torch.Tensor, int, Any]]:
    """Each weight with the rank that updates it and the group that it is sent in."""
    is_expert = any(not getattr(weight, "allreduce", True) for weight in weights)
    group = parallel_state.get_data_parallel_group()
    if is_expert:
        group = parallel_state.get_expert_data_parallel_group()
    shapes = [Weight(tuple(w.shape), 2 if id(w) in fused else 1) for w in weights]
    sizes = [kept_bytes(config, shape, state_bytes) for shape in shapes]
    owners = deal(sizes, group.size())
    return [
        (weight, dist.get_global_rank(group, owner), group)
        for weight, owner in zip(weights, owners, strict=True)
    ]


def _split(group: dict[str, Any], kept: set[int], fused: set[int]) -> list[dict[str, Any]]:
    """What is kept of a parameter group, single matrices apart from fused ones."""
    rates = {name: group[name] for name in ("lr_mult", "wd_mult")}
    mine = [weight for weight in group["params"] if id(weight) in kept]
    single = [weight for weight in mine if id(weight) not in fused]
    double = [weight for weight in mine if id(weight) in fused]
    return [{"params": single, **rates}, {"params": double, "fused": 2, **rates}]


def _wrapped(config: RunConfig, options: OptimizerConfig, made: Any, theirs: Any) -> Any:
    """`made` in the wrapper that holds master weights in bf16."""
    if options.bf16:
        wrapped = Float16OptimizerWithFloat16Params(made, options, None, _init_state)
    else:
        wrapped = FP32Optimizer(made, options, _init_state)
    for name in ("tp_group", "expert_tp_group", "grad_stats_parallel_group"):
        setattr(wrapped, name, getattr(theirs, name, None))
    wrapped.is_dealt = config.optim.distributed_optimizer
    if wrapped.is_dealt:  # then no two ranks keep the same gradient
        wrapped.grad_stats_parallel_group = dist.group.WORLD
    return wrapped


def _init_state(made: Any, _options: OptimizerConfig | None = None) -> None:
    made.init_state()
