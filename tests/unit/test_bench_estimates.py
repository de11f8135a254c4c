"""What `bench.py estimates` computes on paper is what training would."""

import numpy as np
import pytest
import torch

from megascale.runtime import distributed

distributed.prepare_device("auto")  # before megatron-core is imported

import bench_estimates as bench  # noqa: E402

BLOCKS = max(bench.BATCH_TOKENS) // bench.BLOCK_TOKENS


class Router:
    weight = torch.randn(
        bench.EXPERTS, bench.HIDDEN, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(1)
    blocks = np.concatenate([np.arange(BLOCKS - 1), np.full(40, 3)])
    return torch.randn(len(blocks), bench.HIDDEN, generator=generator), blocks


def test_the_gradient_is_that_of_the_balance_loss(tokens):
    x_TH, blocks = tokens
    routing = bench._routing(Router, list(x_TH.split(100)), blocks)
    mine = torch.from_numpy(blocks == 3)
    p_TE = torch.softmax(x_TH[mine] @ Router.weight.T, dim=-1)
    load_E = torch.arange(bench.EXPERTS).float()
    (expected,) = torch.autograd.grad((p_TE @ load_E).sum(), Router.weight)
    found = np.einsum("f,feh->eh", load_E.numpy(), routing.slopes_BEEH[3])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)
    chosen = np.bincount(p_TE.topk(bench.TOP_K).indices.flatten(), minlength=bench.EXPERTS)
    assert routing.counts_BE[3].tolist() == chosen.tolist()
    assert len(routing.counts_BE) == BLOCKS and not routing.counts_BE[-1].any()  # no token is there


def test_estimates_take_what_a_rank_knows():
    counts = np.zeros((2, 2, 4))
    counts[0, :, 0], counts[1, :, 1] = [4, 8], [2, 2]
    befores = {"previous": np.array([1.0, 1, 1, 1]), "trend": np.array([2.0, 0, 1, 1])}
    loads = {way: bench.estimated_loads(way, counts, befores) for way in bench.WAYS}
    for way, before in befores.items():
        assert loads[way].tolist() == [before.tolist()] * 4
    assert loads["micro"].tolist() == [[4, 0, 0, 0]] * 2 + [[0, 4, 0, 0]] * 2
    assert loads["buffer"].tolist() == loads["micro"].tolist()
    first, last = loads["previous_corrected"][:2]
    assert first.tolist() == [1, 1, 1, 1] and last[0] > 1 > last[1]


def test_one_micro_batch_on_one_rank_is_exact_but_for_what_looks_back():
    generator = np.random.default_rng(0)
    seen = [
        bench.Routing(
            generator.integers(1, 9, (BLOCKS, bench.EXPERTS)).astype(float),
            generator.standard_normal((BLOCKS, bench.EXPERTS, bench.EXPERTS, 2)).astype(np.float32),
        )
        for _ in range(4)
    ]
    found = bench.distances(seen, min(bench.BATCH_TOKENS), 1, 1)
    for way in ("micro", "buffer", "buffer_corrected", "previous_corrected"):
        assert max(found[way]) < 1e-6, way
    assert min(found["previous"]) > 0.1
    many = bench.distances(seen, min(bench.BATCH_TOKENS), 2, 8)
    assert many["previous"] == pytest.approx(found["previous"])
    assert many["micro"][0] > many["buffer_corrected"][0] > 0.01


def test_every_sequence_has_a_block_and_every_block_a_sequence():
    lengths = np.random.default_rng(0).integers(1, bench.BLOCK_TOKENS + 1, 9999)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), max(bench.BATCH_TOKENS)) + 1]
    blocks = bench._blocks(lengths, 0)
    assert sorted(set(blocks.tolist())) == list(range(BLOCKS))
    tokens = np.bincount(blocks, weights=lengths)
    assert tokens.max() <= 3 * bench.BLOCK_TOKENS


def test_a_line_in_the_table_and_the_picture_for_every_way(tmp_path):
    rows = [
        {
            "step": step,
            "batch_tokens": tokens,
            "ranks": ranks,
            "micro_batches": micro_batches,
            "one_step": dict.fromkeys(bench.WAYS, 0.5),
            "mean_of_steps": dict.fromkeys(bench.WAYS, 0.25),
        }
        for step in (20, 200)
        for tokens, ranks, micro_batches in bench.regimes()
    ]
    assert {row["ranks"] for row in rows} == set(bench.RANKS)
    trained = [{"estimate": "trend", "seed": 0, "first_half": 1.25, "second_half": 1.125}]
    lines = list(bench.report({"regimes": rows, "training": trained}))
    assert all("0.500 (0.250)" in line for line in lines[2:-2])
    assert lines[-1] == "trend      seed 0  1.2500  1.1250"
    bench.plot(rows, tmp_path / "estimates.png")
    assert (tmp_path / "estimates.png").read_bytes().startswith(b"\x89PNG")
