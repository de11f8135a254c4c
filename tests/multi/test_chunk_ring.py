"""Chunks of sequences that several ranks share, against dense attention in one process."""

import pytest
from test_ring import dense, join

LENGTHS = (50, 9, 1, 30)
CUTS = [
    {0: (0, 21), 1: (0, 5), 2: (0, 1)},
    {},
    {3: (0, 28), 0: (21, 22)},
    {0: (22, 50), 1: (5, 9), 3: (28, 30)},
]


def chunk_differences(window, kv_heads, kernel):
    """Largest errors of out, dq, dk and dv on this rank, of all chunks, in a ring of all ranks in
    another order than theirs."""
    import torch
    import torch.distributed as dist

    from megascale.mesh.chunk_groups import ChunkGroups
    from megascale.mesh.packed_attention import attend
    from megascale.mesh.packing import Segments
    from megascale.planner import Ring
    from megascale.planner.shares import RankMicroBatch

    rank = join(kernel)
    ring_ranks = tuple(reversed(range(dist.get_world_size())))
    torch.manual_seed(0)
    total, padding = sum(LENGTHS), 3
    whole = [torch.randn(total, h, 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads)]
    whole = [x.requires_grad_() for x in whole]
    weights = torch.randn(total, 4, 8, dtype=torch.float64)
    out, _ = dense(*whole, LENGTHS, window)
    expected = [out.detach(), *torch.autograd.grad((out * weights).sum(), whole)]
    begin = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]

    groups, passes, errors = ChunkGroups(), [], []
    for chunk, cut in enumerate(CUTS):
        spans = tuple(cut.values())
        ring = Ring(chunk, ring_ranks, tuple(cut), 0.0, chunk, 0, chunk, len(CUTS), spans)
        mine = RankMicroBatch.of(ring, rank, LENGTHS)
        share = groups.share(mine, ring_ranks, None)
        rows = [
            torch.arange(begin[i] + start, begin[i] + start + tokens)
            for place, i in enumerate(cut)
            for start, tokens in share.spans(place)
        ]
        rows = torch.cat([torch.empty(0, dtype=torch.long), *rows])
        qkv = [
            torch.cat([x.detach()[rows], torch.randn(padding, *x.shape[1:])]).requires_grad_()
            for x in whole
        ]
        segments = Segments.of_share(share, padding, torch.device("cpu"))
        made, _ = attend(*qkv, segments, window=window, layer="only")
        errors.append((made[: len(rows)] - expected[0][rows]).abs().amax() if len(rows) else 0.0)
        grad = torch.cat([weights[rows], torch.randn(padding, 4, 8)]).double()
        passes.append((rows, made, qkv, grad))
    for rows, made, qkv, grad in reversed(passes):
        for found, want in zip(torch.autograd.grad(made, qkv, grad), expected[1:]):
            errors.append((found[: len(rows)] - want[rows]).abs().sum())
            errors.append(found[len(rows) :].abs().sum())
    return float(max(map(float, errors)))


@pytest.mark.parametrize("kernel", [None, "grouped"])
@pytest.mark.parametrize("world", [2, 3])
def test_chunks_of_a_ring_equal_dense_attention(ranks, world, kernel):
    for window, kv_heads in ((None, 2), (None, 1), (1, 2), (7, 2), (25, 4)):
        found = ranks(world, chunk_differences, window, kv_heads, kernel)
        assert max(found) < 1e-10, (window, kv_heads, found)
