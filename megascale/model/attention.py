"""Rotary self-attention over a pack, in the place of megatron-core's core attention.

Shape suffixes: T tokens of the pack, H query heads, G key and value heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megascale.config import RopeScalingConfig
from megascale.fused.rotary import rotate
from megascale.mesh.packed_attention import attend
from megascale.mesh.packing import Segments


class PackedAttention(torch.nn.Module):
    """`core_attention` of a layer spec: rotary embedding by explicit position, then `attend`.

    The rotary embedding is applied here, and not by megatron-core, because megatron-core
    derives positions from the place in the pack; a shard of a sequence has no such place.
    """

    def __init__(
        self,
        config: Any,
        rope_base: float,
        window: int | None,
        rope_scaling: RopeScalingConfig | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.head_dim: int = config.kv_channels
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.window = window
        self.keeps_product: bool = config.qk_layernorm
        """Whether the norm of keys keeps its input, a view of the product with the weights of
        queries, keys and values. If not, a copy of the values frees that product."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> torch.Tensor:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H * D)."""
        del attention_mask, attn_mask_type, attention_bias
        if packed_seq_params is None:
            raise ValueError("PackedAttention needs the segments of the pack")
        segments = packed_seq_params
        if segments.rotary is None:
            segments.rotary = rotary_table(
                segments.positions_T, self.head_dim, self.rope_base, self.rope_scaling
            )
        query, key = rotate(query, key, segments.rotary)
        if not self.keeps_product:
            value = value.contiguous()
        out_THD, _ = attend(query, key, value, segments, window=self.window, layer=self)
        return out_THD.reshape(out_THD.shape[0], -1)


def rotary_table(
    positions_T: torch.Tensor,
    head_dim: int,
    base: float,
    scaling: RopeScalingConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (T, 1, D / 2) in fp32, of position * base^(-2i/D), scaled."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_T.device)
    turning = base ** (-pairs / head_dim)
    if scaling is not None:
        turning = _slowed(turning, scaling)
    angles = positions_T.double()[:, None] * turning
    return angles.cos().float()[:, None], angles.sin().float()[:, None]


def _slowed(turning: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Radians per token, slowed as `RopeScalingConfig` says (Llama 3.1's "llama3" scaling)."""
    turns = scaling.original_tokens * turning / (2 * math.pi)
    kept = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
    return turning * (kept + (1 - kept) / scaling.factor)
