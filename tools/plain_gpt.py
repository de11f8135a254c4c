"""A plain PyTorch GPT of the same shape as ours, written for reading.

It is the oracle of the model's tests and a peer in the step benchmark. Names of weights follow
megatron-core, so that a state dict can be copied over.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from megascale.config import ModelConfig


class PlainAttention(nn.Module):
    """Grouped-query attention with rotary embeddings; (B, T, C) -> (B, T, C)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        heads, groups, size = model.num_heads, model.num_kv_heads, model.head_dim
        rows = (heads + 2 * groups) * size
        self.linear_qkv = nn.Linear(model.hidden_size, rows, bias=model.qkv_bias)
        self.linear_proj = nn.Linear(heads * size, model.hidden_size, bias=False)
        if model.qk_norm:
            self.q_layernorm = nn.RMSNorm(size, model.norm_eps)
            self.k_layernorm = nn.RMSNorm(size, model.norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model, (batch, length, _) = self.model, x.shape
        per_group = model.num_heads // model.num_kv_heads
        # megatron-core's order: for each group its queries, then its key, then its value
        qkv = self.linear_qkv(x).view(batch, length, model.num_kv_heads, per_group + 2, -1)
        q, k, v = qkv.split([per_group, 1, 1], dim=3)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        if model.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = rotate(q, model.rope_base), rotate(k, model.rope_base)
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask(length, x),
            is_causal=model.sliding_window is None,
            enable_gqa=True,
        )
        return self.linear_proj(out.transpose(1, 2).flatten(2))

    def _mask(self, length: int, like: torch.Tensor) -> torch.Tensor | None:
        if self.model.sliding_window is None:
            return None
        ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
        return ones.tril() & ones.triu(1 - self.model.sliding_window)


class PlainMlp(nn.Module):
    """SwiGLU; (B, T, C) -> (B, T, C)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(model.hidden_size, 2 * model.ffn_hidden_size, bias=False)
        self.linear_fc2 = nn.Linear(model.ffn_hidden_size, model.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.linear_fc1(x).chunk(2, dim=-1)
        return self.linear_fc2(functional.silu(gate) * up)


class PlainLayer(nn.Module):
    """One block, serial or parallel; (B, T, C) -> (B, T, C)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.parallel = model.parallel_block
        self.input_layernorm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        self.self_attention = PlainAttention(model)
        if not self.parallel:
            self.pre_mlp_layernorm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        self.mlp = PlainMlp(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.input_layernorm(x)
        if self.parallel:
            return x + self.self_attention(normed) + self.mlp(normed)
        x = x + self.self_attention(normed)
        return x + self.mlp(self.pre_mlp_layernorm(x))


class PlainGpt(nn.Module):
    """The whole model; token ids (B, T) -> logits (B, T, V) of its ids, without padded rows."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.vocab_size is not None  # it is finalized
        rows = model.vocab_size
        self.embedding = nn.Embedding(rows, model.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.num_layers))
        self.final_layernorm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        self.output_layer = nn.Linear(model.hidden_size, rows, bias=False)
        if model.tied_embeddings:
            self.output_layer.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output_layer(self.final_layernorm(x))

    def load_megatron(self, state: dict[str, torch.Tensor]) -> None:
        """Copy the weights of a megatron-core GPT of one rank."""
        renamed = {}
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            name = name.replace("embedding.word_embeddings", "embedding").replace("decoder.", "")
            if name.endswith(("embedding.weight", "output_layer.weight")):
                value = value[: self.embedding.num_embeddings]
            renamed[name.replace("module.", "")] = value
        if self.output_layer.weight is self.embedding.weight:
            renamed["output_layer.weight"] = renamed["embedding.weight"]
        self.load_state_dict(renamed)


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding of (B, H, T, D) by place in the sequence."""
    length, size = x.shape[-2:]
    rates = torch.exp(torch.arange(0, size, 2, device=x.device) * (-math.log(base) / size))
    angles = torch.arange(length, device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
