"""Packed attention against plain attention on each sequence alone."""

import math

import pytest
import torch
from torch.library import Library

from megascale.mesh import packed_attention
from megascale.mesh.kernels import DENSE, FLASH_CPU, VARLEN, Call
from megascale.mesh.packed_attention import attend
from megascale.mesh.packing import Segments
from megascale.mesh.ring_share import RingShare
from megascale.planner.shares import chunk_bounds

LENGTHS = (5, 1, 20, 3)


def reference(q, k, v, window):
    """One sequence, (length, heads, size), scores in memory."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    rows, keys = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
    seen = keys <= rows
    if window:
        seen &= keys > rows - window
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_attention_on_each_sequence_alone(window, kv_heads):
    torch.manual_seed(0)
    q = torch.randn(sum(LENGTHS), 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(sum(LENGTHS), kv_heads, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    out, lse = attend(q, k, v, Segments.of(LENGTHS, torch.device("cpu")), window=window)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))

    parts = [reference(*x, window) for x in zip(*(t.split(LENGTHS) for t in (q, k, v)))]
    out_ref = torch.cat([part[0] for part in parts])
    grads_ref = torch.autograd.grad((out_ref * weights).sum(), (q, k, v))
    torch.testing.assert_close(out, out_ref)
    torch.testing.assert_close(lse, torch.cat([part[1] for part in parts]))
    for grad, grad_ref in zip(grads, grads_ref):
        torch.testing.assert_close(grad, grad_ref)


def _segments(cu_seqlens, causal, left, right):
    """(rows of a segment, its call) of every segment that a call of aten has."""
    left = None if left in (None, -1) else left
    assert right in (None, 0 if causal or left is not None else -1)
    for bounds in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        call = Call(slice(None), slice(None), right == 0, left, (bounds[1] - bounds[0],) * 2)
        yield slice(*bounds), call


def _aten_forward(
    q, k, v, bounds, _keys, _most_q, _most_k, dropout, causal, _debug, *, scale=None,
    window_size_left=None, window_size_right=None, **_
):  # fmt: skip
    """As torch's kernel on CUDA by its schema, in plain operations: lse is (H, T)."""
    assert dropout == 0 and scale is None
    outs, lses = [], []
    for rows, call in _segments(bounds, causal, window_size_left, window_size_right):
        out, lse = DENSE.forward(q[rows], k[rows], v[rows], call)
        outs.append(out)
        lses.append(lse.T)
    nothing = torch.empty(0)
    return torch.cat(outs), torch.cat(lses, dim=1), nothing, nothing, nothing


def _aten_backward(
    grad, q, k, v, out, lse, bounds, _keys, _most_q, _most_k, dropout, causal, _state, _unused, *,
    scale=None, window_size_left=None, window_size_right=None
):  # fmt: skip
    assert dropout == 0 and scale is None and lse.is_contiguous()
    found = []
    for rows, call in _segments(bounds, causal, window_size_left, window_size_right):
        part = (grad[rows], q[rows], k[rows], v[rows], out[rows], lse[:, rows].T)
        found.append(DENSE.backward(*part, call))
    return tuple(torch.cat(parts) for parts in zip(*found))


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """`attend` takes the kernel of CUDA, whose two calls of aten have twins on CPU here."""
    aten = Library("aten", "IMPL")
    aten.impl("_flash_attention_forward", _aten_forward, "CPU")
    aten.impl("_flash_attention_backward", _aten_backward, "CPU")
    monkeypatch.setattr(packed_attention, "kernel_for", lambda query: VARLEN)
    yield
    aten._destroy()


@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("lengths", [LENGTHS, (1, 3)])
def test_the_path_of_cuda_is_one_call_of_a_kernel_of_every_version(varlen_on_cpu, window, lengths):
    """(1, 3) are as many tokens as there are heads: the log-sum-exps may be (T, H) or (H, T)."""
    torch.manual_seed(0)
    q = torch.randn(sum(lengths), 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(sum(lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    segments = Segments.of(lengths, torch.device("cpu"))
    out, lse = attend(q, k, v, segments, window=window)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    parts = [reference(*x, window) for x in zip(*(t.split(lengths) for t in (q, k, v)))]
    out_ref, lse_ref = (torch.cat(x) for x in zip(*parts))
    torch.testing.assert_close(out, out_ref)
    torch.testing.assert_close(lse, lse_ref)
    grads_ref = torch.autograd.grad((out_ref * weights).sum(), (q, k, v))
    for grad, grad_ref in zip(grads, grads_ref):
        torch.testing.assert_close(grad, grad_ref)


def test_packing_is_bit_equal_to_running_one_by_one():
    torch.manual_seed(1)
    q, k, v = (torch.randn(sum(LENGTHS), 2, 16) for _ in range(3))
    packed, _ = attend(q, k, v, Segments.of(LENGTHS, torch.device("cpu")))
    alone = [
        attend(*x, Segments.of([len(x[0])], torch.device("cpu")))[0]
        for x in zip(*(t.split(LENGTHS) for t in (q, k, v)))
    ]
    assert torch.equal(packed, torch.cat(alone))


def test_a_window_needs_causality():
    x = torch.randn(4, 1, 8)
    with pytest.raises(ValueError, match="causal"):
        attend(x, x, x, Segments.of([4], torch.device("cpu")), causal=False, window=2)


def test_a_ring_needs_causality():
    x, cpu = torch.randn(2, 1, 8), torch.device("cpu")
    share = RingShare(0, chunk_bounds([4], 2), (0, 1), None)
    with pytest.raises(ValueError, match="causal"):
        attend(x, x, x, Segments.of_share(share, 0, cpu), causal=False)


@pytest.mark.parametrize(
    "num_queries, num_keys, causal, left",
    [(7, 7, True, None), (7, 7, True, 2), (4, 9, True, 4), (5, 6, False, None), (6, 4, False, 0)],
)
def test_kernels_agree_and_are_right(num_queries, num_keys, causal, left):
    """The dense one by autograd, the flash one by the dense; tests/gpu holds the third to it."""
    torch.manual_seed(2)
    q = torch.randn(num_queries, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(num_keys, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)
    call = Call(slice(None), slice(None), causal, left, (num_queries, num_keys))
    out, lse = DENSE.forward(q, k, v, call)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    seen = [
        [
            (not causal or j - (num_keys - num_queries) <= r)
            and (left is None or j - (num_keys - num_queries) >= r - left)
            for j in range(num_keys)
        ]
        for r in range(num_queries)
    ]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / math.sqrt(8)
    weights = scores.masked_fill(~torch.tensor(seen), float("-inf")).softmax(-1)
    torch.testing.assert_close(
        out, torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))
    )
    for actual, right in zip(DENSE.backward(grad, q, k, v, out, lse, call), expected):
        torch.testing.assert_close(actual, right)
    for actual, right in zip(FLASH_CPU.forward(q, k, v, call), (out, lse)):
        torch.testing.assert_close(actual, right)
    for actual, right in zip(FLASH_CPU.backward(grad, q, k, v, out, lse, call), expected):
        torch.testing.assert_close(actual, right)
