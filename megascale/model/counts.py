"""Parameters and floating-point operations of a model, counted without building it.

All functions want a finalized config. Counts are those of megatron-core's GPT as
`model.build` makes it: RMSNorm, SwiGLU, rotary positions, no biases but `qkv_bias`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megascale.config import Layout, ModelConfig
from megascale.planner.cost import CostModel

BACKWARD_AND_FORWARD = 3
"""A backward pass multiplies twice per weight and per score, a forward pass once."""
LOSS_CHUNK_BYTES = 512 * 2**20
"""Most bytes of the logits that exist at a time, in the precision of the model.

At 128K ids in bf16 these are 2,048 tokens. Adding a chunk's part to the fp32 gradient of the output
weights reads and writes 8 bytes for 2 operations per token of the chunk: 512 operations per byte.
Current GPUs are limited by memory below 160 to 300. Small vocabularies take one chunk.
"""
LOSS_CHUNK_MULTIPLE = 128
"""Tokens of a chunk are a multiple of it, except in the last: tiles of products are full."""


def padded_vocab_size(model: ModelConfig, tensor: int = 1) -> int:
    """Rows of the embedding: the vocabulary up to a multiple of `vocab_multiple` and `tensor`.

    Rows that belong to no id are in no softmax and in no checkpoint (`model.vocabulary`).
    """
    multiple = math.lcm(model.vocab_multiple, tensor)
    return -(-known(model.vocab_size) // multiple) * multiple


def logits_per_token(model: ModelConfig, tensor: int) -> int:
    """Logits that all tensor ranks compute. One alone leaves out the padded rows."""
    return padded_vocab_size(model, tensor) if tensor > 1 else known(model.vocab_size)


def loss_chunk_tokens(rows: int, element_bytes: int) -> int:
    """Tokens whose logits exist at a time, with `rows` logits of `element_bytes` for each."""
    most = LOSS_CHUNK_BYTES // (rows * element_bytes)
    return max(LOSS_CHUNK_MULTIPLE, most // LOSS_CHUNK_MULTIPLE * LOSS_CHUNK_MULTIPLE)


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable parameters of a whole model."""

    total: int
    """All of them; tied embeddings count once."""
    embedding: int
    """Of those, in the input embedding and an untied output head, padding rows included."""
    active: int
    """Of the total, what one token uses: `top_k` of the experts of each layer."""

    @property
    def non_embedding(self) -> int:
        """The total without embeddings, the size that scaling laws speak of."""
        return self.total - self.embedding


def count_parameters(model: ModelConfig, tensor: int = 1) -> ParameterCounts:
    """Parameters of `model`; `tensor` matters only through padding of the vocabulary."""
    embedding = padded_vocab_size(model, tensor) * model.hidden_size
    embedding *= 1 if model.tied_embeddings else 2
    layer = _norm_weights(model) + _router_weights(model)
    layer += _attention_weights(model) + _qkv_biases(model) + _feed_forward_weights(model)
    layer += _all_heads_norms(model)
    experts = model.moe.num_experts * _expert_weights(model) if model.moe else 0
    total = embedding + model.num_layers * (layer + experts) + model.hidden_size
    idle = 0
    if model.moe:
        idle = (model.moe.num_experts - model.moe.top_k) * _expert_weights(model)
    return ParameterCounts(total, embedding, total - model.num_layers * idle)


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one rank holds, by how their optimizer state is sharded."""

    dense: int
    """The same on every rank of the HDP axis."""
    expert: int
    """The same on every `expert`-th rank of the HDP axis."""


def count_rank_parameters(model: ModelConfig, layout: Layout, stage: int) -> RankParameters:
    """Parameters on one rank of pipeline stage `stage`, 0 to layout.pipeline - 1.

    With tied embeddings the last of several stages holds a copy of the embedding.
    """
    tensor, num_layers = layout.tensor, model.num_layers // layout.pipeline
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    whole = _norm_weights(model) + _router_weights(model)
    cut = _attention_weights(model) + _qkv_biases(model) + _feed_forward_weights(model)
    cut += _all_heads_norms(model)
    layer = whole + cut // tensor
    embeddings = 1 if is_first else 0
    if is_last and not (is_first and model.tied_embeddings):
        embeddings += 1
    dense = num_layers * layer + (model.hidden_size if is_last else 0)
    dense += embeddings * padded_vocab_size(model, tensor) // tensor * model.hidden_size
    if model.moe is None:
        return RankParameters(dense, 0)
    experts = model.moe.num_experts // layout.expert
    return RankParameters(dense, num_layers * experts * _expert_weights(model) // tensor)


def flops_per_token(model: ModelConfig, tensor: int = 1) -> int:
    """Forward operations per token in matrix products with weights; attention comes on top.

    A multiply-add is two operations. Norms, activations and rotations are not counted.
    """
    weights = _attention_weights(model) + _feed_forward_weights(model) + _router_weights(model)
    if model.moe:
        weights += model.moe.top_k * _expert_weights(model)
    return 2 * model.num_layers * weights + head_flops_per_token(model, tensor)


def head_flops_per_token(model: ModelConfig, tensor: int = 1) -> int:
    """Those of the output head."""
    return 2 * logits_per_token(model, tensor) * model.hidden_size


def flops_per_pair(model: ModelConfig) -> int:
    """Forward operations per pair of a query token and a key token that it sees."""
    return 4 * model.num_layers * attentions(model) * model.num_heads * known(model.head_dim)


def visible_pairs(lengths: ArrayLike, window: int | None = None) -> int:
    """Pairs of query and key in causal attention over separate sequences of `lengths` tokens.

    Token t of a sequence (from 1) sees min(t, window) tokens, itself included.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    near = tokens if window is None else np.minimum(tokens, window)
    pairs = near * (near + 1) // 2 + (tokens - near) * near
    return int(pairs.sum(dtype=np.int64))


def windows(model: ModelConfig) -> Mapping[int | None, int]:
    """Numbers of layers by sliding window, None for layers without one."""
    return Counter(model.attention_of(layer).window for layer in range(1, model.num_layers + 1))


def attention_flops(model: ModelConfig) -> tuple[float, float]:
    """Forward operations per pair of a query and a key that layers without a window see, and per
    token in layers with one.

    Sliding-window attention is charged its full window for every token, which is too much for
    sequences near or below the window.
    """
    pair = flops_per_pair(model) / model.num_layers
    by_window = windows(model)
    sliding = sum(n * window for window, n in by_window.items() if window is not None)
    return pair * by_window.get(None, 0), pair * sliding


def batch_flops(model: ModelConfig, lengths: ArrayLike, tensor: int = 1) -> int:
    """Operations of a forward and backward pass over packed sequences of `lengths` tokens.

    What recomputation repeats is not counted, as is usual for model FLOPs utilisation.
    """
    num_tokens = int(np.asarray(lengths, dtype=np.int64).sum())
    pairs = sum(n * visible_pairs(lengths, window) for window, n in windows(model).items())
    of_layer = flops_per_pair(model) // model.num_layers
    forward = num_tokens * flops_per_token(model, tensor) + pairs * of_layer
    return BACKWARD_AND_FORWARD * forward


def default_cost(model: ModelConfig, tensor: int = 1) -> CostModel:
    """Uncalibrated cost model for the planner, from the operation counts (`attention_flops`)."""
    pair, sliding = attention_flops(model)
    per_token, per_token_squared = flops_per_token(model, tensor) + pair / 2 + sliding, pair / 2
    # keys and values, forward; they and their gradients, backward; bf16
    passed = 3 * 2 * known(model.num_kv_heads) * known(model.head_dim) * 2 * model.num_layers
    passed *= attentions(model)
    return CostModel.from_flops(
        BACKWARD_AND_FORWARD * per_token, BACKWARD_AND_FORWARD * per_token_squared, passed / tensor
    )


def _attention_weights(model: ModelConfig) -> int:
    """Weights of one layer's query, key, value and output products."""
    heads, groups = model.num_heads, known(model.num_kv_heads)
    one = (2 * heads + 2 * groups) * known(model.head_dim) * model.hidden_size
    return attentions(model) * one


def attentions(model: ModelConfig) -> int:
    """Attentions that every token passes in one layer."""
    return model.moe.attention_experts if model.moe else 1


def _qkv_biases(model: ModelConfig) -> int:
    """Biases of one layer's queries, keys and values."""
    heads = model.num_heads + 2 * known(model.num_kv_heads)
    return attentions(model) * heads * known(model.head_dim) if model.qkv_bias else 0


def _norm_weights(model: ModelConfig) -> int:
    """Weights of one layer's norms that every tensor rank has, those of queries and keys per head
    included."""
    per_head = model.qk_norm and model.qk_norm_heads == "each"
    qk = 2 * attentions(model) * known(model.head_dim) if per_head else 0
    return (1 if model.parallel_block else 2) * model.hidden_size + qk


def _all_heads_norms(model: ModelConfig) -> int:
    """Weights of one layer's norms over all heads, which tensor ranks share."""
    if not model.qk_norm or model.qk_norm_heads == "each":
        return 0
    heads = model.num_heads + known(model.num_kv_heads)
    return attentions(model) * heads * known(model.head_dim)


def _feed_forward_weights(model: ModelConfig) -> int:
    """Weights of one layer's SwiGLU, or of its shared expert; no routed experts."""
    if model.moe is None:
        return 3 * model.hidden_size * known(model.ffn_hidden_size)
    return 3 * model.hidden_size * model.moe.shared_ffn_hidden_size


def _router_weights(model: ModelConfig) -> int:
    """Weights of one layer's routers, of experts and of attentions, and of the shared gate."""
    if model.moe is None:
        return 0
    mixed = attentions(model) if attentions(model) > 1 else 0
    gate = 1 if model.moe.shared_gate else 0
    return (model.moe.num_experts + mixed + gate) * model.hidden_size


def _expert_weights(model: ModelConfig) -> int:
    """Weights of one expert of one layer."""
    assert model.moe is not None
    return 3 * model.hidden_size * known(model.moe.ffn_hidden_size)


def known(value: int | None) -> int:
    """A derived value of a finalized config."""
    assert value is not None, "the config is not finalized"
    return value
