"""The kernel of `fused.merge`: one launch, which reads and writes every number once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library


@library.custom_op("megascale::merge", mutates_args=("out", "lse"))
def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    first: int,
    rows: torch.Tensor | None,
    part: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """What `merge.merge_plain` does, in rows from `first` on, or in `rows`."""
    tokens, heads, size = part.shape
    if tokens:
        _merge[(tokens, heads)](
            *(out, lse, first, out if rows is None else rows, part, part_lse),
            *(*out.stride()[:2], *lse.stride(), *part.stride()[:2], *part_lse.stride()),
            size,
            INDEXED=rows is not None,
            SIZE=triton.next_power_of_2(size),
            num_warps=1,  # a program has one row of one head
        )


@merge.register_fake
def _(out, lse, first, rows, part, part_lse):  # type: ignore[no-untyped-def]
    return None


@triton.jit(do_not_specialize=["first"])
def _merge(
    out, lse, first, rows, part, part_lse,
    out_token, out_head, lse_token, lse_head,
    part_token, part_head, part_lse_token, part_lse_head,
    size, INDEXED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + token) if INDEXED else first + token
    column = tl.arange(0, SIZE)
    at_lse = lse + row * lse_token + head * lse_head
    at_out = out + row * out_token + head * out_head + column
    before = tl.load(at_lse)
    here = tl.load(part_lse + token * part_lse_token + head * part_lse_head).to(tl.float32)
    kept = tl.load(at_out, mask=column < size, other=0.0)
    new = tl.load(
        part + token * part_token + head * part_head + column, mask=column < size, other=0.0
    )
    weight = tl.sigmoid(here - before)
    largest = tl.maximum(before, here)
    tl.store(at_out, kept + weight * (new.to(tl.float32) - kept), mask=column < size)
    tl.store(at_lse, largest + tl.log(tl.exp(before - largest) + tl.exp(here - largest)))
