"""Several attentions in a layer, all run and mixed per token (BAM, arXiv 2408.08274)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class AttentionExperts(MegatronModule):  # type: ignore[misc]
    """sum_e softmax(W x)_e * Attention_e(x), each with keys and values of its own.

    Soft routing, as the paper found top-k routing of attention to be clearly worse.
    """

    def __init__(
        self, config: Any, layer_number: int, expert: ModuleSpec, num_experts: int, **options: Any
    ) -> None:
        super().__init__(config=config)
        self.experts = torch.nn.ModuleList(
            build_module(expert, config=config, layer_number=layer_number, **options)
            for _ in range(num_experts)
        )
        shape = (num_experts, config.hidden_size)
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, None]:
        """(T, 1, hidden) -> (T, 1, hidden); the None is megatron-core's unused bias."""
        exact = torch.promote_types(hidden_states.dtype, torch.float32)
        logits = torch.nn.functional.linear(hidden_states.to(exact), self.weight.to(exact))
        shares = torch.softmax(logits, dim=-1).to(hidden_states.dtype)
        outputs = [expert(hidden_states, **inputs)[0] for expert in self.experts]
        return sum(shares[..., e, None] * one for e, one in enumerate(outputs)), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Each attention's own tensors, under `experts.<number>.`, and the router's."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight}, f"{prefix}router.", {}, sharded_offsets
        )
        for number, expert in enumerate(self.experts):
            own = f"{prefix}experts.{number}."
            state |= expert.sharded_state_dict(own, sharded_offsets, metadata)
        return state
