"""Gradients of weights that products add to their fp32 sums, on CPU ranks, against autograd."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_layouts import single, train_curve
from test_offload_ranks import gradients_by_ratio, start, step_and_evaluate


def accumulating(function, *args):
    """`function` with linear layers as they are on CUDA."""
    from megascale.model import build

    described = build.transformer_config

    def fused(*given):
        return replace(described(*given), gradient_accumulation_fusion=True)

    with patch.object(build, "transformer_config", fused):
        return function(*args)


def overlapping(function, *args):
    """The same, where gradients are reduced as soon as the last one of a bucket is there."""
    from megascale.model import build

    reduction = build._reduction

    def early(*given):
        return replace(reduction(*given), overlap_grad_reduce=True)

    with patch.object(build, "_reduction", early):
        return accumulating(function, *args)


@pytest.mark.parametrize(
    "world, overrides",
    [
        (1, ["train.recompute=full"]),
        (2, []),
        (2, ["parallel.tensor=2", "model.qkv_bias=true"]),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=false"]),
        (2, ["parallel.pipeline=2"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_training_is_the_same(ranks, world, overrides):
    expected = single(ranks, *[option for option in overrides if option.startswith("model.")])
    for curve in map(np.array, ranks(world, overlapping, train_curve, tuple(overrides))):
        np.testing.assert_allclose(curve[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(curve, expected, rtol=1e-4)


def test_offload_changes_nothing(ranks):
    """Then a saved weight comes back as another object than the parameter."""
    (found,) = ranks(1, accumulating, gradients_by_ratio, ())
    assert all(worst == 0 for worst, *_ in found) and found[-1][1] > 0
    ((moved, *_),) = ranks(1, overlapping, step_and_evaluate, ())
    assert moved > 0


def sums():
    """The gradients of one micro-batch in bf16, by name, and whether their layer added them."""
    from megascale.training.step import run_micro_batches

    learner, micro_batches = start(["train.precision=bf16"])
    run_micro_batches(learner, micro_batches[:1], 1)
    return {
        name: (weight.main_grad.clone(), weight.grad_added_to_main_grad)
        for name, weight in learner.model.named_parameters()
    }


def test_sums_are_not_rounded_to_the_precision_of_weights(ranks):
    (plain,), (found,) = ranks(1, sums), ranks(1, accumulating, sums)
    for name, (gradient, added) in found.items():
        is_linear = "linear_" in name and gradient.dim() == 2
        assert added == is_linear or "embedding" in name
        rounded = gradient.bfloat16().float()
        assert is_linear != rounded.equal(gradient) or "embedding" in name
        torch.testing.assert_close(gradient, plain[name][0], rtol=2**-7, atol=1e-5)
