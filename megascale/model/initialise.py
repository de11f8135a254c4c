"""Initial weights that depend on the seed and the weight's name, not on the layout of ranks."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from megascale.config import ModelConfig
from megascale.model.vocabulary import VOCABULARY, ids_among

OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")
CLOSED_TOKENS = "closed_tokens"
"""Name of what a masked layer keeps beside its weights: the tokens until it is open."""
STARTS_AT_ZERO = (".bias", CLOSED_TOKENS)


def initialise(model: MegatronModule, config: ModelConfig, seed: int) -> None:
    """Fill `model` in place.

    Matrices are normal with `init_std`; the projections back into the residual stream are
    scaled by 1/sqrt(2 layers), as in GPT-2; biases are zeros, other vectors (norms) ones. Every
    rank draws the whole matrix of a name and keeps its shard, so TP, PP and EP do not change the
    model. Nor does padding of the vocabulary, whose rows are zeros.
    """
    with torch.no_grad():
        for entry in _flatten(model.sharded_state_dict()):
            for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                if isinstance(shard, dict):
                    continue
                _fill(shard, config, seed)


def named_generator(name: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that depend on a name and a seed alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial(
    key: str,
    place: tuple[int, ...],
    shape: tuple[int, ...],
    config: ModelConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The initial weight `key` of the layer (and expert) that `place` counts, in fp32."""
    if len(shape) == 1:
        return torch.full(shape, float(not key.endswith(STARTS_AT_ZERO)), device=device)
    scaled = key.endswith(OUTPUT_PROJECTIONS)
    std = config.init_std / (math.sqrt(2 * config.num_layers) if scaled else 1.0)
    generator = named_generator(f"{key}/{place}", seed, device)
    return torch.randn(shape, generator=generator, device=device) * std


def _flatten(tree: object) -> list[ShardedTensor | ShardedTensorFactory]:
    if isinstance(tree, (ShardedTensor, ShardedTensorFactory)):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [leaf for value in values for leaf in _flatten(value)]


def _fill(shard: ShardedTensor, config: ModelConfig, seed: int) -> None:
    stacked = shard.prepend_axis_num
    place, offsets = shard.global_offset[:stacked], shard.global_offset[stacked:]
    shape, own = shard.global_shape[stacked:], shard.data.view(shard.local_shape[-len(offsets) :])
    if shard.key in VOCABULARY:
        assert config.vocab_size is not None  # it is finalized
        shape = (config.vocab_size, *shape[1:])
        known = ids_among(len(own), offsets[0], config.vocab_size)
        own[known:] = 0
        own = own[:known]
    whole = initial(shard.key, place, shape, config, seed, shard.data.device)
    part = tuple(slice(o, o + n) for o, n in zip(offsets, own.shape, strict=True))
    own.copy_(whole[part])
