"""Rotary self-attention over a pack, in the place of megatron-core's core attention.

Shape suffixes: T tokens of the pack, H query heads, G key and value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megascale.config import LayerAttention, RopeScalingConfig
from megascale.fused.rotary import rotate
from megascale.mesh.packed_attention import attend
from megascale.mesh.packing import Segments

SHORTEST_RAMP = 0.001
"""Pairs over which the slowing of YaRN begins at least, so that nothing is divided by 0."""


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
        layers: Sequence[LayerAttention] = (),
        layer_number: int = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        self.head_dim: int = config.kv_channels
        attention = LayerAttention(window, (rope_base, rope_scaling))
        if layers:
            attention = layers[layer_number - 1]
        self.window, self.rotary = attention.window, attention.rotary
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
        query, key = self._rotated(query, key, segments)
        if not self.keeps_product:
            value = value.contiguous()
        out_THD, _ = attend(query, key, value, segments, window=self.window, layer=self)
        return out_THD.reshape(out_THD.shape[0], -1)

    def _rotated(
        self, query: torch.Tensor, key: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rotary is None:  # a copy frees the product, as that of the values does
            return query.contiguous(), key.contiguous()
        tables = segments.rotary
        if self.rotary not in tables:
            tables[self.rotary] = rotary_table(segments.positions_T, self.head_dim, *self.rotary)
        return rotate(query, key, tables[self.rotary])


def rotary_table(
    positions_T: torch.Tensor,
    head_dim: int,
    base: float,
    scaling: RopeScalingConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (T, 1, D / 2) in fp32, of position * base^(-2i/D), scaled as
    `RopeScalingConfig` says."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_T.device)
    turning, amplitude = base ** (-pairs / head_dim), 1.0
    if scaling is not None:
        kept = _kept(turning, base, scaling)
        turning, amplitude = turning * (kept + (1 - kept) / scaling.factor), scaling.amplitude
    angles = positions_T.double()[:, None] * turning
    return (amplitude * angles.cos()).float()[:, None], (amplitude * angles.sin()).float()[:, None]


def _kept(turning: torch.Tensor, base: float, scaling: RopeScalingConfig) -> torch.Tensor:
    """The part of each pair's radians per token that is not slowed, 0 to 1."""
    if scaling.kind == "linear":
        return torch.zeros_like(turning)
    if scaling.kind == "yarn":
        return _kept_by_yarn(turning, base, scaling)
    turns = scaling.original_tokens * turning / (2 * math.pi)
    return ((turns - scaling.low_turns) / (scaling.kept_turns - scaling.low_turns)).clamp(0, 1)


def _kept_by_yarn(turning: torch.Tensor, base: float, scaling: RopeScalingConfig) -> torch.Tensor:
    """A ramp over the numbers of the pairs (arXiv 2309.00071, section 3.2), between those with
    `kept_turns` and `low_turns`."""
    count = len(turning)
    first, last = (
        count * math.log(scaling.original_tokens / (2 * math.pi * turns)) / math.log(base)
        for turns in (scaling.kept_turns, scaling.low_turns)
    )
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    numbers = torch.arange(count, dtype=turning.dtype, device=turning.device)
    return 1 - ((numbers - first) / max(last - first, SHORTEST_RAMP)).clamp(0, 1)
