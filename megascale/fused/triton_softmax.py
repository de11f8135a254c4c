"""The kernels of `fused.softmax`: one pass over the logits for each step, in their precision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

BLOCK = 4096
"""Logits that a program reads at once."""
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""In the place of the largest logit where there is none."""


@library.custom_op("megascale::summarise", mutates_args=())
def summarise(
    logits: torch.Tensor, known: int, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(most, total, target) as `softmax.summarise_plain` has them."""
    most, total, target = (_of(logits) for _ in range(3))
    if len(logits):
        _summarise[(len(logits),)](
            *(logits, logits.stride(0), known, rows, most, total, target), BLOCK=BLOCK
        )
    return most, total, target


@summarise.register_fake
def _(logits, known, rows):  # type: ignore[no-untyped-def]
    return tuple(_of(logits) for _ in range(3))


def _of(logits: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(logits), dtype=torch.float32, device=logits.device)


@library.custom_op("megascale::differentiate", mutates_args=("logits",))
def differentiate(
    logits: torch.Tensor, most: torch.Tensor, scale: torch.Tensor, known: int, rows: torch.Tensor
) -> None:
    """Turn the logits into their gradient, as `softmax.differentiate_plain` has it."""
    tokens, width = logits.shape
    if tokens:
        _differentiate[(tokens, triton.cdiv(width, BLOCK))](
            logits, logits.stride(0), width, known, most, scale, rows, BLOCK=BLOCK
        )


@differentiate.register_fake
def _(logits, most, scale, known, rows):  # type: ignore[no-untyped-def]
    return None


@triton.jit(do_not_specialize=["known"])
def _summarise(logits, stride, known, rows, most, total, target, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    logits += token * stride
    row = tl.load(rows + token)
    largest = LOWEST
    summed = 0.0
    for start in range(0, known, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < known, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        # a NaN shows in the sum, even if the maximum drops it
        summed = summed * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    at_target = tl.load(logits + row, mask=row >= 0, other=0.0).to(tl.float32)
    tl.store(most + token, largest)
    tl.store(total + token, summed)
    tl.store(target + token, at_target)


@triton.jit(do_not_specialize=["known"])
def _differentiate(logits, stride, width, known, most, scale, rows, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + token * stride + column
    x = tl.load(at, mask=column < known, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(most + token)) * tl.load(scale + token)
    gradient -= tl.where(column == tl.load(rows + token), 1.0, 0.0)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=column < width)
