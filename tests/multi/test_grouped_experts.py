"""Experts that are multiplied together, on CPU ranks, against experts that run one by one."""

import numpy as np
import pytest
from test_checkpoint import EXPERT, MOE, TENSOR, initial_state, loaded, same, trained_and_saved
from test_layouts import single, train_curve

EIGHT = ("model.moe.num_experts=8", "model.moe.top_k=3")


def grouped(function, *args):
    """`function` where experts are grouped, as on CUDA."""
    from megascale.model import build

    sequential = build.groups_experts
    build.groups_experts = lambda config, device: config.model.moe is not None
    try:
        return function(*args)
    finally:
        build.groups_experts = sequential


@pytest.mark.parametrize(
    "world, overrides",
    [
        (1, EIGHT),
        (1, (*EIGHT, "model.moe.shared_ffn_hidden_size=32", "train.recompute=full")),
        (1, (*EIGHT, "train.recompute=selective")),
        (2, (*EIGHT, "parallel.expert=2")),
        (2, ("model.moe.num_experts=4", "model.moe.top_k=1", "parallel.expert=2")),
        (2, ("model.moe.num_experts=2", "parallel.expert=2")),
        (2, (*EIGHT, "parallel.tensor=2")),
        (2, (*EIGHT, "parallel.pipeline=2")),
        (2, (*EIGHT, "parallel.expert=2", "model.moe.dispatcher=allgather")),
        (4, (*EIGHT, "parallel.expert=2", "parallel.tensor=2")),
        (2, ("model.moe.num_experts=4", "model.moe.attention_experts=2")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_training_is_that_of_sequential_experts(ranks, world, overrides):
    """Padding, experts without tokens and several layouts; limits are those of test_layouts."""
    shape = [option for option in overrides if option.startswith("model.")]
    expected = single(ranks, *shape)
    for curve in map(np.array, ranks(world, grouped, train_curve, tuple(overrides))):
        np.testing.assert_allclose(curve[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(curve[:, 0], expected[:, 0], rtol=1e-4)
        np.testing.assert_allclose(curve[:, 1], expected[:, 1], rtol=5e-4)


@pytest.mark.parametrize("cut", [[], [TENSOR], [EXPERT]], ids=str)
def test_initial_weights_lie_where_those_of_sequential_experts_do(ranks, cut):
    whole = ranks(1, initial_state, [MOE])[0]
    assert same(whole, ranks(max(1, 2 * len(cut)), grouped, initial_state, [MOE, *cut])[0])


@pytest.mark.parametrize("world, cut", [(1, []), (2, [TENSOR]), (2, [EXPERT]), (2, [])], ids=str)
def test_each_resumes_what_the_other_saved(ranks, tmp_path, world, cut):
    """Weights, moments and master weights are bit-equal."""
    options = [MOE, "train.precision=bf16", *cut]
    ours, theirs = str(tmp_path / "grouped"), str(tmp_path / "sequential")
    follow = range(2, 4)
    state, losses = ranks(world, grouped, trained_and_saved, ours, options, follow)[0]
    assert any("experts.experts.linear_fc1" in key for key in state)
    found, losses_after = ranks(world, loaded, ours, options, follow)[0]
    assert same(state, found) and losses_after == pytest.approx(losses, rel=1e-3)
    state, losses = ranks(world, trained_and_saved, theirs, options, follow)[0]
    found, losses_after = ranks(world, grouped, loaded, theirs, options, follow)[0]
    assert same(state, found) and losses_after == pytest.approx(losses, rel=1e-3)
