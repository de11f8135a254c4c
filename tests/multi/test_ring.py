"""Ring attention against dense block-diagonal attention in one process."""

import math

import pytest

LENGTHS = ((17,), (1,), (1, 1, 1), (5, 40, 3, 1), (100, 33), (2, 64, 7))
"""Odd lengths, single tokens, and sequences with fewer tokens than chunks."""


def dense(q, k, v, lengths, window):
    """Output and log-sum-exp of each sequence alone, scores in memory."""
    import torch

    outs, lses = [], []
    for q_one, k_one, v_one in zip(*(x.split(lengths) for x in (q, k, v))):
        copies = q.shape[1] // k.shape[1]
        k_one, v_one = k_one.repeat_interleave(copies, 1), v_one.repeat_interleave(copies, 1)
        scores = torch.einsum("qhd,khd->hqk", q_one, k_one) / math.sqrt(q.shape[-1])
        rows, keys = torch.arange(len(q_one))[:, None], torch.arange(len(q_one))[None]
        seen = (keys <= rows) & (keys > rows - (window or len(q_one)))
        scores = scores.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_one))
        lses.append(scores.logsumexp(-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def differences(ring, place, lengths, window, kv_heads, dtype, group=None):
    """Largest errors of out, lse, dq, dk, dv on this rank, relative to 1 + the largest value, by
    an fp64 oracle. The pack ends with padding, of noise, whose gradient is noise too."""
    import torch

    from megascale.mesh.packed_attention import attend
    from megascale.mesh.packing import Segments
    from megascale.mesh.ring_share import RingShare
    from megascale.planner.shares import chunk_bounds

    torch.manual_seed(len(lengths) + (window or 0))
    total, padding = sum(lengths), 3
    whole = [torch.randn(total, h, 8).to(dtype).double() for h in (4, kv_heads, kv_heads)]
    whole = [x.requires_grad_() for x in whole]
    weights = torch.randn(total, 4, 8).to(dtype).double()
    out, lse = dense(*whole, lengths, window)
    expected = [out, lse, *torch.autograd.grad((out * weights).sum(), whole)]

    share = RingShare(place, chunk_bounds(lengths, len(ring)), ring, group)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    held = [
        torch.arange(begin + start, begin + start + tokens)
        for i, begin in enumerate(starts)
        for start, tokens in share.spans(i)
    ]
    rows = torch.cat([torch.empty(0, dtype=torch.long), *held])
    mine = [torch.cat([x.detach()[rows], torch.randn(padding, *x.shape[1:])]) for x in whole]
    mine = [x.to(dtype).requires_grad_() for x in mine]
    segments = Segments.of_share(share, padding, torch.device("cpu"))
    out, lse = attend(*mine, segments, window=window)
    assert not lse.requires_grad
    grad = torch.cat([weights[rows], torch.randn(padding, 4, 8)]).to(dtype)
    actual = [out, lse, *torch.autograd.grad(out, mine, grad)]
    for x in (actual[0], *actual[2:]):
        assert x.dtype == dtype and x.isfinite().all() and not x[len(rows) :].any()
    return [
        float((x[: len(rows)].double() - y[rows]).abs().max() / (1 + y.abs().max()))
        if len(rows)
        else 0.0
        for x, y in zip([x.detach() for x in actual], [y.detach() for y in expected])
    ]


def join(kernel=None):
    """Join the other ranks and warm the group; attention uses the named kernel."""
    import torch
    import torch.distributed as dist

    from megascale.mesh import kernels, ring_attention

    dist.init_process_group("gloo")
    dist.all_reduce(torch.zeros(1))
    named = {"dense": kernels.DENSE, "grouped": kernels.Kernel(*grouped(kernels), grouped=True)}
    ring_attention.kernel_for = (lambda _: named[kernel]) if kernel else kernels.kernel_for
    return dist.get_rank()


def grouped(kernels):
    """What the CUDA kernel does, segment after segment by the dense one."""
    import torch

    def segments(call):
        queries, keys = (bounds.tolist() for bounds in call.cu_seqlens)
        assert max(b - a for a, b in zip(queries, queries[1:])) == call.longest[0]
        assert max(b - a for a, b in zip(keys, keys[1:])) == call.longest[1]
        for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:]):
            alone = call._replace(longest=(q1 - q0, k1 - k0), cu_seqlens=None)
            yield slice(q0, q1), slice(k0, k1), alone

    def forward(q, k, v, call):
        parts = [kernels.DENSE.forward(q[a], k[b], v[b], c) for a, b, c in segments(call)]
        return tuple(torch.cat(part) for part in zip(*parts))

    def backward(grad, q, k, v, out, lse, call):
        parts = [
            kernels.DENSE.backward(grad[a], q[a], k[b], v[b], out[a], lse[a], c)
            for a, b, c in segments(call)
        ]
        return tuple(torch.cat(part) for part in zip(*parts))

    return forward, backward


def compare(dtype, kernel, windows, kv_heads):
    """Errors of all cases in one ring of all ranks."""
    import torch
    import torch.distributed as dist

    place = join(kernel)
    ring = tuple(range(dist.get_world_size()))
    return {
        (lengths, window, heads): differences(
            ring, place, lengths, window, heads, getattr(torch, dtype)
        )
        for lengths in LENGTHS
        for window in windows
        for heads in kv_heads
    }


def check(results, tolerance):
    for on_rank in results:
        assert on_rank
        for case, errors in on_rank.items():
            assert max(errors) < tolerance, (case, errors)


@pytest.mark.parametrize(
    "world, dtype, kernel, tolerance",
    [
        (2, "float64", None, 1e-10),
        (3, "float64", None, 1e-10),
        (4, "float64", None, 1e-10),
        (3, "float64", "dense", 1e-10),
        (2, "float64", "grouped", 1e-10),
        (3, "float64", "grouped", 1e-10),
        (3, "float32", None, 1e-4),
        (3, "bfloat16", None, 3e-2),
    ],
)
def test_a_ring_equals_dense_attention(ranks, world, dtype, kernel, tolerance):
    cases = dtype, kernel, (None, 1, 3, 7, 64), (1, 2, 4)
    check(ranks(world, compare, *cases), tolerance)


def run_subsets():
    """Rings over some of the ranks, in any order of theirs, one after the other."""
    import torch

    rank, errors = join(), {}
    for ring in ((1, 3), (2, 0, 3), (3, 1), (3, 2, 1, 0), (0, 1), (1, 2, 0)):
        if rank in ring:
            place = ring.index(rank)
            errors[ring] = differences(ring, place, (30, 1, 9), None, 2, torch.float64)
    return errors


def test_rings_on_some_of_the_ranks(ranks):
    check(ranks(4, run_subsets), 1e-10)


def run_large():
    """16 MiB each way at every hop: more than sockets hold."""
    import torch

    from megascale.mesh.ring_attention import ring_attend
    from megascale.mesh.ring_share import RingShare
    from megascale.planner.shares import chunk_bounds

    place, tokens = join(), 4096
    share = RingShare(place, chunk_bounds([2 * tokens], 2), (0, 1), None)
    q = torch.ones(tokens, 1, 512, requires_grad=True)
    out, _ = ring_attend(q, q, q, share, window=2)
    out.sum().backward()
    return float(out.min()), float(out.max()), bool(q.grad.isfinite().all())


def test_messages_larger_than_any_buffer(ranks):
    for least, most, finite in ranks(2, run_large):
        assert abs(least - 1) < 1e-5 and abs(most - 1) < 1e-5 and finite


def record_order():
    """What happens in one forward and one backward pass, and how many numbers are sent."""
    import torch
    import torch.distributed as dist

    from megascale.mesh import kernels, ring_attention

    place, log, flash = join(), [], kernels.FLASH_CPU
    exchange = dist.batch_isend_irecv

    def post(messages):
        log.append(("post", [m.tensor.numel() for m in messages if m.op is dist.isend]))
        return exchange(messages)

    def logged(name, function):
        def call(*args):
            log.append((name, None))
            return function(*args)

        return call

    dist.batch_isend_irecv = post
    forward, backward = logged("forward", flash.forward), logged("backward", flash.backward)
    ring_attention.kernel_for = lambda _: kernels.Kernel(forward, backward, grouped=False)
    try:
        differences((0, 1, 2), place, (60,), None, 2, torch.float64)
    finally:
        dist.batch_isend_irecv = exchange
    return log


def test_transfers_start_before_compute_and_send_key_heads_alone(ranks):
    share = 2 * 20 * 2 * 8  # keys and values, tokens, key heads, head size
    post, forward, backward = ("post", [share]), ("forward", None), ("backward", None)
    assert ranks(3, record_order)[0] == [
        *(post, forward, post, forward, forward),
        *(post, backward, post, backward),  # these posts are keys and values,
        *(post, backward, post),  # and these their gradients, on their way home
    ]
