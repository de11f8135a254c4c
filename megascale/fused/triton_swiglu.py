"""The kernels of `fused.swiglu`. No number of tokens is compiled into them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

BLOCK = 1024
"""Features that a program computes at once."""


@library.custom_op("megascale::gate", mutates_args=())
def gate(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """What `swiglu.gate_plain` does."""
    x, output = x.contiguous(), _half(x)
    tokens, features = output.shape
    if output.numel():
        _gate[(tokens, triton.cdiv(features, BLOCK))](
            x, x if weights is None else weights.contiguous(), output, features,
            WEIGHTED=weights is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return output


@gate.register_fake
def _(x, weights):  # type: ignore[no-untyped-def]
    return _half(x)


@library.custom_op("megascale::gate_backward", mutates_args=())
def gate_backward(
    gradient: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `swiglu.gate_backward_plain` does. Without weights, the second result is empty."""
    gradient, x = gradient.contiguous(), x.contiguous()
    for_x, for_weights = _gradients(x, weights)
    tokens, features = gradient.shape
    if gradient.numel():
        _gate_backward[(tokens,)](
            gradient, x, x if weights is None else weights.contiguous(), for_x, for_weights,
            features, WEIGHTED=weights is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return for_x, for_weights


@gate_backward.register_fake
def _(gradient, x, weights):  # type: ignore[no-untyped-def]
    return _gradients(x, weights)


def _half(x: torch.Tensor) -> torch.Tensor:
    return torch.empty((len(x), x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _gradients(x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = 0 if weights is None else len(x)
    for_weights = torch.empty(tokens, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), for_weights


@triton.jit
def _gate(x, weights, output, features, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, at = column < features, x + token * 2 * features + column
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + features, mask=mask, other=0.0).to(tl.float32)
    result = first * tl.sigmoid(first) * second
    if WEIGHTED:
        result *= tl.load(weights + token).to(tl.float32)
    tl.store(output + token * features + column, result.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward(
    gradient, x, weights, for_x, for_weights, features,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    kind = x.dtype.element_ty
    weight = tl.load(weights + token).to(tl.float32) if WEIGHTED else 1.0
    summed = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask, place = column < features, token * 2 * features + column
        given = tl.load(gradient + token * features + column, mask=mask, other=0.0).to(tl.float32)
        first = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + place + features, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(first)
        if WEIGHTED:
            summed += given * first * sigmoid * second
        given *= weight
        for_first = given * second * sigmoid * (1 + first * (1 - sigmoid))
        tl.store(for_x + place, for_first.to(kind), mask=mask)
        tl.store(for_x + place + features, (given * first * sigmoid).to(kind), mask=mask)
    if WEIGHTED:
        tl.store(for_weights + token, tl.sum(summed, axis=0))
