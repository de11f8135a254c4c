"""Our attention in models of `transformers`: packed sequences, whole or on a ring of ranks."""

from __future__ import annotations

import math
from typing import Any

import torch

from megascale.mesh.packed_attention import attend
from megascale.mesh.packing import Segments

NAME = "megascale"


def use_in_transformers() -> str:
    """Make `attend` known to `transformers`; the name to give as `attn_implementation`.

    A model that is made with it takes `segments` of a micro-batch beside its inputs:
    `model(input_ids=batch.tokens_T[None], position_ids=batch.segments.positions_T[None],
    segments=batch.segments, use_cache=False)`. Attention is causal within each sequence. Models
    with dropout in attention, or that add anything to the scores, are not for it: ValueError then,
    and for an attention mask that leaves tokens out.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


def _no_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> None:
    """The mask of a model's layers: none, since segments say what attends to what."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention over packed sequences takes no mask and no padding; see pack")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(1, H, T, D), (1, G, T, D), (1, G, T, D) -> (1, T, H, D)."""
    if segments is None:
        raise ValueError("pass segments= to the model; megascale.mesh.micro_batches makes them")
    if attention_mask is not None or dropout:
        raise ValueError("attention over packed sequences takes no mask and no dropout")
    if scaling is not None:  # `attend` divides by the root of the head size
        query = query * (scaling * math.sqrt(query.shape[-1]))
    q_THD, k_TGD, v_TGD = (part[0].transpose(0, 1) for part in (query, key, value))
    out_THD, _lse = attend(q_THD, k_TGD, v_TGD, segments, window=sliding_window, layer=module)
    return out_THD[None], None
