"""Attention over packed sequences: one function, with a kernel behind it per device.

Shape suffixes: T tokens of the pack, H query heads, G key and value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch.nn import functional

from megascale.mesh.kernels import Call, kernel_for
from megascale.mesh.packing import Segments
from megascale.mesh.ring_attention import ring_attend


def attend(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    segments: Segments,
    causal: bool = True,
    window: int | None = None,
    layer: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-diagonal attention: each token sees its own sequence only.

    With `causal` it sees the past alone, with `window` only the last `window` tokens of it,
    itself included. Returns the output (T, H, D) and the log-sum-exp of the scores (T, H), by
    which partial results over different keys can be joined. Scores are scaled by 1/sqrt(D).
    Gradients flow through the output only. Where `segments` are a share of a ring, all its ranks
    must call this together. Where they are a chunk of sequences, each token sees the chunks before
    it too, as far as they ran under the same `layer`, a name that each attention of the model has
    for itself; backward passes of chunks come in reverse order.
    """
    if window is not None and not causal:
        raise ValueError("attend: a window looks back, so it needs causal=True")
    if segments.ring is not None:
        if not causal:
            raise ValueError("attend: a ring needs causal=True")
        return ring_attend(q_THD, k_TGD, v_TGD, segments.ring, window, layer)
    kernel = kernel_for(q_THD)
    if kernel.grouped:
        call = _call_of(segments, causal, window)
        out, lse = _PackedAttention.apply(q_THD, k_TGD, v_TGD, call, kernel)
        return out, lse
    plain = _cpu_flash if not q_THD.is_cuda else _dense
    return _by_sequence(plain, q_THD, k_TGD, v_TGD, segments, causal, window)


class _PackedAttention(torch.autograd.Function):
    """All sequences of a pack in one call of a kernel that takes segments."""

    @staticmethod
    def forward(ctx, q, k, v, call, kernel):  # type: ignore[no-untyped-def]
        out, lse = kernel.forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.kernel = call, kernel
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        return *ctx.kernel.backward(grad, q, k, v, out, lse, ctx.call), None, None


def _call_of(segments: Segments, causal: bool, window: int | None) -> Call:
    longest, whole, bounds = max(segments.lengths), slice(None), segments.cu_seqlens
    left = window - 1 if window is not None and window < longest else None
    return Call(whole, whole, causal, left, (longest, longest), (bounds, bounds))


def _by_sequence(kernel, q, k, v, segments, causal, window):  # type: ignore[no-untyped-def]
    """Run `kernel` on the sequences one by one, heads first, and join what it returns."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    split = [x.transpose(0, 1).unsqueeze(0).split(segments.lengths, dim=2) for x in (q, k, v)]
    outs, lses = zip(
        *(_banded(kernel, *part, causal, window) for part in zip(*split, strict=True)), strict=True
    )
    out = torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)
    return out, torch.cat(lses, dim=2).squeeze(0).transpose(0, 1)


def _banded(kernel, q, k, v, causal, window):  # type: ignore[no-untyped-def]
    """One sequence (1, H, length, D); a window is cut into bands, so the cost is O(T * window)."""
    length = q.shape[2]
    if window is None or window >= length:
        return kernel(q, k, v, causal, None)
    outs, lses = [], []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        rows = torch.arange(start, stop, device=q.device)[:, None]
        keys = torch.arange(first, stop, device=q.device)[None, :]
        seen = (keys <= rows) & (keys > rows - window)
        hidden = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float("-inf"))
        band = slice(first, stop)
        out, lse = kernel(q[:, :, start:stop], k[:, :, band], v[:, :, band], False, hidden)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _cpu_flash(q, k, v, causal, bias):  # type: ignore[no-untyped-def]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias)
    return out, lse


def _dense(q, k, v, causal, bias):  # type: ignore[no-untyped-def]
    """Plain attention with the scores in memory; the fp32 path on CUDA, used by tests."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        length = q.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if bias is not None:
        scores = scores + bias
    return functional.softmax(scores, dim=-1) @ v, scores.detach().logsumexp(dim=-1)
