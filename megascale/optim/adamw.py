"""AdamW, megatron-core's own; its distributed optimizer cuts the state into equal ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megascale.config import Layout, RunConfig
from megascale.model.counts import count_rank_parameters
from megascale.optim.optimizer_kind import OptimizerKind, StateTensors

if TYPE_CHECKING:
    from megascale.model.model import Model


def _build(_config: RunConfig, options: Any, model: Model) -> Any:
    from megatron.core.optimizer import get_megatron_optimizer

    return get_megatron_optimizer(options, model.chunks, use_gloo_process_groups=False)


def _state_bytes(config: RunConfig, layout: Layout, stage: int) -> int:
    """Two moments of 4 bytes, and a master copy of 4 in bf16.

    With the distributed optimizer they are split over the HDP axis, and those of experts over
    every `expert`-th rank of it.
    """
    held = count_rank_parameters(config.model, layout, stage)
    dense_shards = layout.hdp if config.optim.distributed_optimizer else 1
    expert_shards = layout.hdp // layout.expert if config.optim.distributed_optimizer else 1
    state = -(-held.dense // dense_shards) + -(-held.expert // expert_shards)
    return state * (12 if config.train.precision == "bf16" else 8)


OPTIMIZER = OptimizerKind(_build, _state_bytes, StateTensors(moments=("exp_avg", "exp_avg_sq")))
