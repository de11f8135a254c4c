"""Norms: over the width, over all heads of a rank's queries or keys, and layers that norm outputs.

Shape suffixes: T tokens of the pack, H heads of this tensor rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megascale.fused.recompute import computed_by


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32.

    Unlike megatron-core's torch-wrapped norm it marks its weight for sequence parallelism, so
    that its gradient is summed over the tensor ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., hidden)."""
        return computed_by("norms", self._norm(x), self._norm, x)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads of queries or keys, those of other tensor ranks included (OLMo 2)."""

    def __init__(self, config: Any, hidden_size: int, heads: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps, self.count = eps, heads * hidden_size
        held = self.count // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(held, dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, ..., H, D) -> (T, ..., H, D)."""
        exact = x.flatten(-2).float()
        square = exact.square().sum(dim=-1, keepdim=True)
        # every rank's output depends on the sum, so the gradient is summed over ranks too
        square = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(square)
        )
        normed = exact * torch.rsqrt(square / self.count + self.eps)
        return (normed.to(x.dtype) * self.weight).view(x.shape)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Its weight, cut over the tensor ranks."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets
        )
        return state


class NormAfterLayer(TransformerLayer):  # type: ignore[misc]
    """h = x + LN Attention(x), y = h + LN MLP(h): norms on what the parts add (OLMo 2)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.attention_output_norm = RMSNorm(config, size, eps)
        self.mlp_output_norm = RMSNorm(config, size, eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """(T, 1, hidden) -> (T, 1, hidden); the None is megatron-core's unused context."""
        attention, _bias = self.self_attention(
            hidden_states, attention_mask=attention_mask, packed_seq_params=packed_seq_params
        )
        hidden_states = hidden_states + self.attention_output_norm(attention)
        feed_forward, _bias = self.mlp(hidden_states)
        return hidden_states + self.mlp_output_norm(feed_forward), None
