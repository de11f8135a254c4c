"""Tokens that pad a micro-batch to the multiple of CUDA reach no count, loss or gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_heads: 2, vocab_size: 100,
        moe: {num_experts: 4, top_k: 2, ffn_hidden_size: 32, z_loss_coeff: 0.01}}
data: {sources: {a: {path: unused}, b: {path: unused}}, context_tokens: 64}
train: {precision: fp32}
device: cpu
"""


def step_padded(overrides: list[str], multiple: int) -> Any:
    """Loss, norm, use of experts and weights after a step of micro-batches of this multiple."""
    from megascale.config import finalize, parse_config
    from megascale.mesh.packing import TokenSequence, pack
    from megascale.model.build import build_model
    from megascale.optim.build import build_optimizer
    from megascale.runtime import distributed
    from megascale.training.step import Learner, train_step

    config = finalize(parse_config(CONFIG, overrides), {"a": 1000, "b": 1000}, 100)
    ranks = distributed.start(config)
    model = build_model(config, ranks)
    learner = Learner(config, ranks, model, build_optimizer(config, model))
    ids = [np.random.default_rng(n).integers(0, 100, n + 1) for n in (17, 40, 5, 22)]
    bag = [TokenSequence(one[:-1], one[1:]) for one in ids]
    batches = [
        pack(bag[:2], 99, multiple, ranks.device, sources=(0, 1)),
        pack(bag[2:], 99, multiple, ranks.device, sources=(1, 1)),
    ]
    results = [train_step(learner, batches, 2, 84, 84 * (n + 1)) for n in range(2)]
    weights = [weight.detach().numpy() for weight in model.parameters()]
    return [(r.loss, r.grad_norm, r.experts) for r in results], weights


@pytest.mark.parametrize("balance", ["global", "micro", "sequence", "loss_free"])
def test_padding_to_128_tokens_changes_nothing(ranks: Any, balance: str) -> None:
    overrides = [f"model.moe.balance={balance}"]
    ((plain, weights),) = ranks(1, step_padded, overrides, 1)
    ((padded, padded_weights),) = ranks(1, step_padded, overrides, 128)
    for (loss, norm, experts), (loss_p, norm_p, experts_p) in zip(plain, padded):
        assert loss_p == pytest.approx(loss, rel=1e-6)
        assert norm_p == pytest.approx(norm, rel=1e-5)
        assert float(experts.counts_SLE.sum()) == 84 * 2 * 2  # tokens, choices, layers
        assert experts_p.counts_SLE.equal(experts.counts_SLE)
        np.testing.assert_allclose(experts_p.probability_LE, experts.probability_LE, rtol=1e-5)
    for weight, other in zip(weights, padded_weights):
        np.testing.assert_allclose(other, weight, rtol=1e-3, atol=1e-5)
