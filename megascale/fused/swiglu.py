"""SwiGLU: silu of one half of the features times the other half, in fp32 inside.

Shape suffixes: N tokens, F features of a half.
"""

from __future__ import annotations

from typing import Any

import torch

from megascale.fused.choice import use_kernel
from megascale.fused.recompute import computed_by


def swiglu(x_N2F: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """(N, F): silu(first half) * second half, times the weight of the token where there are any.

    The input alone is kept for the backward pass. With weights it belongs to experts.
    """
    output: torch.Tensor = _SwiGlu.apply(x_N2F, weights_N)
    if weights_N is None:
        return computed_by("swiglu", output, _gate, x_N2F)
    return computed_by("experts", output, _gate, x_N2F, weights_N)


def use_in_megatron() -> None:
    """Let megatron-core's layers compute their fused SwiGLU by this module.

    megatron-core compiles its own at run time, and again when the number of tokens changes. The
    names here are in every supported version.
    """
    import megatron.core.transformer.mlp as mlp
    import megatron.core.transformer.moe.experts as experts
    import megatron.core.transformer.moe.shared_experts as shared_experts

    mlp.bias_swiglu_impl = shared_experts.bias_swiglu_impl = _without_bias
    mlp.weighted_bias_swiglu_impl = experts.weighted_bias_swiglu_impl = _weighted


def _without_bias(x: torch.Tensor, bias: None, *_: Any) -> torch.Tensor:
    """In the place of megatron-core's `bias_swiglu_impl`; no layer of ours has a bias here."""
    assert bias is None
    return swiglu(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _weighted(x: torch.Tensor, bias: None, weights: torch.Tensor, *_: Any) -> torch.Tensor:
    """In the place of its `weighted_bias_swiglu_impl`, of experts; weights are (N, 1)."""
    assert bias is None
    return swiglu(x, weights[:, 0])


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weights)
        return _gate(x, weights)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weights = ctx.saved_tensors
        if use_kernel(x):
            from megascale.fused.triton_swiglu import gate_backward

            for_x, for_weights = gate_backward(gradient, x, weights)
            return for_x, None if weights is None else for_weights.to(weights.dtype)
        return gate_backward_plain(gradient, x, weights)


def _gate(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    if use_kernel(x):
        from megascale.fused.triton_swiglu import gate

        output: torch.Tensor = gate(x, weights)
        return output
    return gate_plain(x, weights)


def gate_plain(x_N2F: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of the forward pass."""
    first, second = _exact(x_N2F).chunk(2, dim=-1)
    output = torch.nn.functional.silu(first) * second
    if weights_N is not None:
        output = output * weights_N[:, None]
    return output.to(x_N2F.dtype)


def gate_backward_plain(
    gradient_NF: torch.Tensor, x_N2F: torch.Tensor, weights_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The twin of the backward pass: gradients of the input and of the weights."""
    first, second = _exact(x_N2F).chunk(2, dim=-1)
    gated, given, for_weights = torch.nn.functional.silu(first), _exact(gradient_NF), None
    if weights_N is not None:
        for_weights = (given * gated * second).sum(dim=-1).to(weights_N.dtype)
        given = given * weights_N[:, None]
    for_first = torch.ops.aten.silu_backward(given * second, first)
    return torch.cat([for_first, given * gated], dim=-1).to(x_N2F.dtype), for_weights


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
