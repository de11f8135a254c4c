"""Chunks of sequences on one rank have the outputs and gradients of the whole sequences."""

import numpy as np
import pytest
import torch

from megascale.mesh import kernels, ring_attention
from megascale.mesh.chunk_cache import ChunkCache
from megascale.mesh.chunk_groups import ChunkGroups
from megascale.mesh.in_memory import micro_batches
from megascale.mesh.packed_attention import attend
from megascale.mesh.packing import Segments, TokenSequence
from megascale.planner import Ring
from megascale.planner.shares import RankMicroBatch

CPU = torch.device("cpu")
LENGTHS = (40, 7, 1, 25)
CUTS = {  # of each chunk, its sequences and the tokens of each
    "equal": [
        {0: (0, 20), 1: (0, 4), 3: (0, 12)},
        {0: (20, 40), 1: (4, 7), 2: (0, 1), 3: (12, 25)},
    ],
    "one sequence": [{0: (0, 3)}, {0: (3, 21)}, {0: (21, 40)}],
    # sequences that end early, begin late, or are in no chunk between; other orders; nothing
    "uneven": [
        {1: (0, 5), 0: (0, 1)},
        {},
        {0: (1, 33), 3: (0, 24)},
        {3: (24, 25), 0: (33, 40), 1: (5, 7)},
    ],
}


def chunk_rings(cuts, ranks=(0,)):
    count = len(cuts)
    return [
        Ring(i, ranks, tuple(cut), 0.0, i, 0, i, count, spans=tuple(cut.values()))
        for i, cut in enumerate(cuts)
    ]


def whole(tensors, lengths, window):
    """Output and gradients of the sum of outputs * weights, sequence by sequence."""
    *qkv, weights = tensors
    qkv = [x.clone().requires_grad_() for x in qkv]
    out, _ = attend(*qkv, Segments.of(lengths, CPU), window=window)
    return out.detach(), torch.autograd.grad((out * weights).sum(), qkv)


@pytest.mark.parametrize("kernel, on_host", [(None, False), ("dense", False), (None, True)])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 6, 30])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_chunks_equal_whole_sequences(monkeypatch, cuts, window, heads, kernel, on_host):
    """With two attentions one after the other, and padding that is noise."""
    if kernel:
        monkeypatch.setattr(ring_attention, "kernel_for", lambda _: kernels.DENSE)
    torch.manual_seed(0)
    used = sorted({sequence for cut in cuts for sequence in cut})
    begin = dict(zip(used, np.cumsum([0, *(LENGTHS[i] for i in used)]).tolist()))
    total, lengths = sum(LENGTHS[i] for i in used), [LENGTHS[i] for i in used]
    shapes = [(total, 4, 8), (total, heads, 8), (total, heads, 8), (total, 4, 8)]
    layers = {name: [torch.randn(*s, dtype=torch.float64) for s in shapes] for name in ("a", "b")}
    expected = {name: whole(tensors, lengths, window) for name, tensors in layers.items()}

    groups, padding, passes = ChunkGroups(on_host), 3, []
    for ring in chunk_rings(cuts):
        share = groups.share(RankMicroBatch.of(ring, 0, LENGTHS), (0,), None)
        rows = [
            torch.arange(begin[i] + b, begin[i] + e)
            for i, (b, e) in zip(ring.sequences, ring.spans)
        ]
        rows = torch.cat([torch.empty(0, dtype=torch.long), *rows])
        for name, tensors in layers.items():
            mine = [torch.cat([x[rows], torch.randn(padding, *x.shape[1:])]) for x in tensors]
            qkv = [x.requires_grad_() for x in mine[:3]]
            out, _ = attend(*qkv, Segments.of_share(share, padding, CPU), window=window, layer=name)
            torch.testing.assert_close(
                out[: len(rows)], expected[name][0][rows], rtol=0, atol=1e-12
            )
            passes.append((name, rows, out, qkv, mine[3]))
    for name, rows, out, qkv, weights in reversed(passes):
        for grad, want in zip(torch.autograd.grad(out, qkv, weights), expected[name][1]):
            torch.testing.assert_close(grad[: len(rows)], want[rows], rtol=0, atol=1e-12)
            assert not grad[len(rows) :].any()
    assert not any(layer.kept_2SGD for layer in share.cache._layers.values())


def test_host_memory_has_copies():
    own = torch.randn(2, 5, 1, 8)
    for on_host in (False, True):
        cache = ChunkCache(on_host)
        cache.extend("a", 0, own, slice(None))
        (kept,) = cache._layers["a"].kept_2SGD
        assert torch.equal(kept, own) and (kept is own) is not on_host


@pytest.mark.parametrize("where", ["device", "host"])
def test_the_option_reaches_the_cache(where):
    from types import SimpleNamespace

    from megascale.config import finalize, parse_config
    from megascale.training.reading import reader_of

    text = "{model: {}, data: {sources: {x: {path: none}}}, train: {tokens: 100}}"
    config = finalize(parse_config(text, [f"planner.chunk_cache={where}"]), {"x": 1000}, 100)
    reader = reader_of(config, SimpleNamespace(hdp_rank=0, device=CPU, axis=None), [])
    assert reader.keeps_chunks_on_host is (where == "host")


def test_recomputation_runs_a_chunk_again():
    """A chunk that ran forward without a graph runs forward once more before its backward pass."""
    torch.manual_seed(0)
    shapes = [(40, 2, 8)] * 4
    tensors = [torch.randn(*s, dtype=torch.float64) for s in shapes]
    expected_out, expected = whole(tensors, [40], None)
    groups, shares, rows = ChunkGroups(), [], [torch.arange(0, 15), torch.arange(15, 40)]
    for ring in chunk_rings([{0: (0, 15)}, {0: (15, 40)}]):
        shares.append(groups.share(RankMicroBatch.of(ring, 0, (40,)), (0,), None))

    def run(i):
        qkv = [x[rows[i]].requires_grad_() for x in tensors[:3]]
        out, _ = attend(*qkv, Segments.of_share(shares[i], 0, CPU), layer="a")
        return out, qkv

    with torch.no_grad():
        for _ in ("evaluation", "the first pass of recomputation"):
            for i in (0, 1):
                torch.testing.assert_close(run(i)[0], expected_out[rows[i]])
                kept = bool(shares[i].cache._layers)
                Segments.of_share(shares[i], 0, CPU).end_group()
                assert kept and bool(shares[i].cache._layers) is (i == 0)
        for i in (0, 1):
            run(i)
    for i in (1, 0):
        out, qkv = run(i)
        for grad, want in zip(torch.autograd.grad(out, qkv, tensors[3][rows[i]]), expected):
            torch.testing.assert_close(grad, want[rows[i]], rtol=0, atol=1e-12)


def test_a_chunk_needs_a_name_and_its_earlier_chunks():
    groups = ChunkGroups()
    first, second = (
        groups.share(RankMicroBatch.of(ring, 0, (8,)), (0,), None)
        for ring in chunk_rings([{0: (0, 4)}, {0: (4, 8)}])
    )
    q = torch.randn(4, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match="layer="):
        attend(q, q, q, Segments.of_share(first, 0, CPU))
    out, _ = attend(q, q, q, Segments.of_share(first, 0, CPU), layer="a")
    out.sum().backward()
    with pytest.raises(RuntimeError, match="all chunks of a group forward"):
        attend(q, q, q, Segments.of_share(second, 0, CPU), layer="a")


def test_micro_batches_of_chunks_have_their_tokens_and_positions():
    from dataclasses import replace

    from megascale.planner import CostModel, Problem, plan_longest_first

    plan = plan_longest_first(Problem.of(LENGTHS, 1, 100, "free", CostModel(a=1e-9, b=1e-6)))
    rings = chunk_rings(CUTS["equal"])
    sequences = [TokenSequence(np.arange(n), np.arange(n) + 100 * i) for i, n in enumerate(LENGTHS)]
    batches = list(micro_batches(replace(plan, rings=tuple(rings)), 0, sequences, multiple=8))
    for ring, batch in zip(rings, batches):
        spans = list(zip(ring.sequences, ring.spans))
        positions = [p for _, (b, e) in spans for p in range(b, e)]
        assert batch.num_tokens == len(positions) and len(batch.tokens_T) % 8 == 0
        assert batch.segments.positions_T[: len(positions)].tolist() == positions
        assert batch.tokens_T[: len(positions)].tolist() == positions
        targets = [p + 100 * i for i, (b, e) in spans for p in range(b, e)]
        assert batch.targets_T[: len(positions)].tolist() == targets
    assert batches[0].segments.ring.cache is batches[1].segments.ring.cache
