"""The kernel of `fused.rotary`: queries and keys in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import library

BLOCK_HEADS = 8
"""Heads that a program turns."""


@library.custom_op("megascale::turn", mutates_args=())
def turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotary.turn_plain` makes of both, or with `is_back` of both and the negative sines."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    query, key = _like(q), _like(k)
    tokens, half = len(q), q.shape[-1] // 2
    blocks = [triton.cdiv(x.shape[1], BLOCK_HEADS) for x in (q, k)]
    if tokens:
        _turn[(tokens, sum(blocks))](
            *(q, query, q.stride(0), q.stride(1), q.shape[1]),
            *(k, key, k.stride(0), k.stride(1), k.shape[1]),
            *(cos.contiguous(), sin.contiguous(), blocks[0], half),
            HALF=triton.next_power_of_2(half),
            HEADS=BLOCK_HEADS,
            BACK=is_back,
        )
    return query, key


@turn.register_fake
def _(q, k, cos, sin, is_back):  # type: ignore[no-untyped-def]
    return _like(q), _like(k)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit(do_not_specialize=["query_blocks", "query_heads", "key_heads"])
def _turn(
    q, query, q_token, q_head, query_heads,
    k, key, k_token, k_head, key_heads,
    cos, sin, query_blocks, half,
    HALF: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, HALF)
    c = tl.load(cos + token * half + pair, mask=pair < half, other=0.0)[None, :]
    s = tl.load(sin + token * half + pair, mask=pair < half, other=0.0)[None, :]
    if BACK:
        s = -s
    if block < query_blocks:
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        _heads(q + token * q_token, query, token, q_head, head, query_heads, c, s, half, pair)
    else:
        head = (block - query_blocks) * HEADS + tl.arange(0, HEADS)[:, None]
        _heads(k + token * k_token, key, token, k_head, head, key_heads, c, s, half, pair)


@triton.jit
def _heads(x, y, token, x_head, head, num_heads, c, s, half, pair):
    mask = (head < num_heads) & (pair[None, :] < half)
    at = x + head * x_head + pair[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    to = y + (token * num_heads + head) * 2 * half + pair[None, :]
    kind = y.dtype.element_ty
    tl.store(to, (first * c - second * s).to(kind), mask=mask)
    tl.store(to + half, (second * c + first * s).to(kind), mask=mask)
