"""The rotary embedding of queries and keys, in fp32 inside.

Shape suffixes: T tokens of the pack, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import torch

from megascale.fused.choice import use_kernel

Table = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each (T, 1, D / 2) in fp32."""


def rotate(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, table: Table
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the pair (i, i + D/2) of every head by its angle, as Llama does.

    The backward pass turns gradients back, so nothing is kept but the table, which is shared.
    """
    query, key = _Rotary.apply(q_THD, k_TGD, *table)
    return query, key


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx, for_query, for_key):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return *_turn(for_query, for_key, cos, sin, True), None, None


def _turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if use_kernel(q):
        from megascale.fused.triton_rotary import turn

        query, key = turn(q, k, cos, sin, is_back)
        return query, key
    sin = -sin if is_back else sin
    return turn_plain(q, cos, sin), turn_plain(k, cos, sin)


def turn_plain(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The twin, of queries or keys."""
    exact = torch.promote_types(x_THD.dtype, torch.float32)
    first, second = x_THD.to(exact).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_THD.dtype)
