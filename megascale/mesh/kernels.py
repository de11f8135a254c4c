"""Attention of some queries over some keys, forward and backward, apart from autograd.

A ring sees the keys of a query in parts. The forward pass of a part gives an output and the
log-sum-exp (lse) by which parts are joined; its backward pass is given the output and lse over
all parts, and then yields the part's share of the gradients (FlashAttention-2, section 3.1).

Shape suffixes: Q queries, K keys, H query heads, G key and value heads, D head size; inside the
kernels the H heads are R copies of the G heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Rows = slice | torch.Tensor
"""Rows of a tensor: a slice, or their indices (each at most once)."""


class Call(NamedTuple):
    """What one call of a kernel computes: segments of queries, each over its segment of keys.

    Query r of a segment of Q sees key j of K when j - (K - Q) lies between r - `left` and, if
    `causal`, r. So both masks are aligned at the last query and the last key.
    """

    queries: Rows
    keys: Rows
    causal: bool
    left: int | None
    """None: no window."""
    longest: tuple[int, int]
    """Most queries and most keys of a segment."""
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = None
    """Bounds of the segments of queries and keys, int32; None: there is one segment."""


class Kernel(NamedTuple):
    """`forward(q, k, v, call) -> out (Q, H, D), lse (Q, H)`;
    `backward(grad, q, k, v, out, lse, call) -> dq (Q, H, D), dk, dv (K, G, D)`."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    grouped: bool
    """Takes many segments in one call."""


def kernel_for(query: torch.Tensor) -> Kernel:
    """The fastest kernel for the device and type of `query`."""
    if not query.is_cuda:
        return FLASH_CPU
    return VARLEN if query.dtype in (torch.bfloat16, torch.float16) else DENSE


def _flash_cpu_forward(q, k, v, call):  # type: ignore[no-untyped-def]
    bias = _bias(call, q) if call.left is not None else None
    q, k, v = _fold(q, k, v)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, call.causal and bias is None, attn_mask=bias)
    return _unfold(out), _unfold(lse[..., None])[..., 0]


def _flash_cpu_backward(grad, q, k, v, out, lse, call):  # type: ignore[no-untyped-def]
    bias = _bias(call, q) if call.left is not None else None
    groups = k.shape[1]
    q, k, v = _fold(q, k, v)
    grad, out = _fold_queries(grad, groups), _fold_queries(out, groups)
    lse = _fold_queries(lse[..., None], groups)[..., 0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    causal = call.causal and bias is None
    dq, dk, dv = flash(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias)
    return _unfold(dq), _sum_copies(dk), _sum_copies(dv)


def _dense_forward(q, k, v, call):  # type: ignore[no-untyped-def]
    """Scores in memory: the exact reference, and the fp32 path on CUDA."""
    bias = _bias(call, q)
    q, k, v = _fold(q, k, v)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return _unfold((scores - lse).exp() @ v), _unfold(lse)[..., 0]


def _dense_backward(grad, q, k, v, out, lse, call):  # type: ignore[no-untyped-def]
    bias, scale, groups = _bias(call, q), q.shape[-1] ** -0.5, k.shape[1]
    q, k, v = _fold(q, k, v)
    grad, out, lse = (_fold_queries(x, groups) for x in (grad, out, lse[..., None]))
    weights = (q @ k.transpose(-1, -2) * scale + bias - lse).exp()
    delta = (grad * out).sum(dim=-1, keepdim=True)
    dscores = weights * (grad @ v.transpose(-1, -2) - delta) * scale
    dk, dv = dscores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
    return _unfold(dscores @ k), _sum_copies(dk), _sum_copies(dv)


def _varlen_forward(q, k, v, call):  # type: ignore[no-untyped-def]
    out, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *call.cu_seqlens,
        *call.longest,
        0.0,
        call.causal and call.left is None,
        False,
        **_flash_window(call),
    )
    return out, lse_HQ.transpose(0, 1)


def _varlen_backward(grad, q, k, v, out, lse, call):  # type: ignore[no-untyped-def]
    """The random state is unused, since nothing is dropped; torch's own varlen_attn passes
    zeros too."""
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        q,
        k,
        v,
        out,
        lse.transpose(0, 1).contiguous(),
        *call.cu_seqlens,
        *call.longest,
        0.0,
        call.causal and call.left is None,
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, device=q.device),
        **_flash_window(call),
    )


def _flash_window(call: Call) -> dict[str, int]:
    return {
        "window_size_left": -1 if call.left is None else call.left,
        "window_size_right": 0 if call.causal else -1,
    }


FLASH_CPU = Kernel(_flash_cpu_forward, _flash_cpu_backward, grouped=False)
DENSE = Kernel(_dense_forward, _dense_backward, grouped=False)
VARLEN = Kernel(_varlen_forward, _varlen_backward, grouped=True)


def _fold(q_QHD, k_KGD, v_KGD):  # type: ignore[no-untyped-def]
    """Views (R, G, tokens, D) of all three; keys and values are not copied R times."""
    copies, groups = q_QHD.shape[1] // k_KGD.shape[1], k_KGD.shape[1]
    k, v = (x.transpose(0, 1).expand(copies, -1, -1, -1) for x in (k_KGD, v_KGD))
    return _fold_queries(q_QHD, groups), k, v


def _fold_queries(x_QHD: torch.Tensor, groups: int) -> torch.Tensor:
    return x_QHD.unflatten(1, (groups, -1)).permute(2, 1, 0, 3)


def _unfold(x_RGQD: torch.Tensor) -> torch.Tensor:
    return x_RGQD.permute(2, 1, 0, 3).flatten(1, 2)


def _sum_copies(x_RGKD: torch.Tensor) -> torch.Tensor:
    return x_RGKD.sum(dim=0).transpose(0, 1)


def _bias(call: Call, q: torch.Tensor) -> torch.Tensor:
    """(Q, K): 0 where a query sees a key, minus infinity where it does not."""
    num_queries, num_keys = call.longest
    rows = torch.arange(num_queries, device=q.device)[:, None]
    keys = torch.arange(num_keys, device=q.device)[None] - (num_keys - num_queries)
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if call.causal:
        hidden |= keys > rows
    if call.left is not None:
        hidden |= keys < rows - call.left
    return torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, float("-inf"))
