"""Initial weights that depend on the seed and the weight's name, not on the layout of ranks."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from megascale.config import ModelConfig

OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def initialise(model: MegatronModule, config: ModelConfig, seed: int) -> None:
    """Fill `model` in place.

    Matrices are normal with `init_std`; the projections back into the residual stream are
    scaled by 1/sqrt(2 layers), as in GPT-2; biases are zeros, other vectors (norms) ones. Every
    rank draws the whole matrix of a name and keeps its shard, so TP, PP and EP do not change the
    model.
    """
    with torch.no_grad():
        for entry in _flatten(model.sharded_state_dict()):
            for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                if isinstance(shard, dict):
                    continue
                _fill(shard, config, seed)


def _flatten(tree: object) -> list[ShardedTensor | ShardedTensorFactory]:
    if isinstance(tree, (ShardedTensor, ShardedTensorFactory)):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [leaf for value in values for leaf in _flatten(value)]


def _fill(shard: ShardedTensor, config: ModelConfig, seed: int) -> None:
    stacked = shard.prepend_axis_num
    shape = shard.global_shape[stacked:]
    if len(shape) == 1:
        shard.data.fill_(0.0 if shard.key.endswith(".bias") else 1.0)
        return
    name = f"{seed}/{shard.key}/{shard.global_offset[:stacked]}"
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator(shard.data.device).manual_seed(
        int.from_bytes(digest[:8], "little") >> 1
    )
    scaled = shard.key.endswith(OUTPUT_PROJECTIONS)
    std = config.init_std / (math.sqrt(2 * config.num_layers) if scaled else 1.0)
    whole = torch.randn(shape, generator=generator, device=shard.data.device) * std
    offsets = shard.global_offset[stacked:]
    part = tuple(
        slice(o, o + n) for o, n in zip(offsets, shard.local_shape[-len(shape) :], strict=True)
    )
    shard.data.copy_(whole[part].view_as(shard.data))
