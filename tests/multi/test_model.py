"""The megatron-core model against a plain PyTorch one with the same weights."""

import numpy as np
import pytest
import torch

from megascale.config import finalize, parse_config

BASE = """
model: {num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2}
data: {sources: {random: {path: none}}, context_tokens: 64}
train: {precision: fp32, threads: 1}
"""
LENGTHS = (40, 1, 23)


def compare_with_plain(overrides):
    """Largest differences of the losses per token and of the embedding's gradient."""
    from plain_gpt import PlainGpt

    from megascale.mesh.packing import TokenSequence, pack
    from megascale.model.build import build_model
    from megascale.model.counts import count_parameters
    from megascale.runtime import distributed

    config = finalize(parse_config(BASE, overrides), {"random": 10000}, 257)
    ranks = distributed.start(config)
    model = build_model(config, ranks)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config.model).total
    # else a rank would reduce gradients after each of its micro-batches
    (chunk,) = model.chunks
    assert chunk.config.no_sync_func == chunk.no_sync
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            assert not weight.any()
            torch.nn.init.normal_(weight)
    plain = PlainGpt(config.model)
    plain.load_megatron(chunk.module.state_dict())
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 257, n + 1) for n in LENGTHS]
    batch = pack([TokenSequence(x[:-1], x[1:]) for x in ids], 256, 1, ranks.device)
    loss_T = chunk(
        input_ids=batch.tokens_T[None],
        position_ids=None,
        attention_mask=None,
        labels=batch.targets_T[None],
        packed_seq_params=batch.segments,
    ).flatten()
    expected_T = torch.cat(
        [
            torch.nn.functional.cross_entropy(
                plain(torch.tensor(x[None, :-1]))[0], torch.tensor(x[1:]), reduction="none"
            )
            for x in ids
        ]
    )
    loss_T.sum().backward()
    expected_T.sum().backward()
    grad = next(p for n, p in model.named_parameters() if "word_embeddings" in n).main_grad
    assert grad.shape == (384, 64) and not grad[257:].any()
    grad = grad[:257]
    return (
        (loss_T - expected_T).abs().max().item(),
        (grad - plain.embedding.weight.grad).abs().max().item(),
        plain.embedding.weight.grad.abs().max().item(),
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.tied_embeddings=false",),
        ("model.qk_norm=true", "model.rope_base=500"),
        ("model.parallel_block=true",),
        ("model.sliding_window=8",),
        ("model.qkv_bias=true",),
        ("model.head_dim=32", "model.num_kv_heads=1", "model.ffn_hidden_size=100"),
    ],
)
def test_losses_and_gradients_are_those_of_a_plain_model(ranks, overrides):
    ((loss_error, grad_error, grad_size),) = ranks(1, compare_with_plain, overrides)
    assert loss_error < 1e-5
    assert grad_error < 1e-4 * grad_size


def compare_as_on_cuda(overrides):
    """`compare_with_plain`, with the fused SwiGLU of CUDA; and its largest error in experts."""
    from megatron.core.transformer.moe import experts

    from megascale.model import build

    usual = build.transformer_config

    def fused(config, ranks):
        core = usual(config, ranks)
        core.bias_activation_fusion = True
        return core

    build.transformer_config = fused
    try:
        found = compare_with_plain(overrides)
    finally:
        build.transformer_config = usual
    x, weights = torch.randn(5, 12), torch.rand(5, 1)
    expected = torch.nn.functional.silu(x[:, :6]) * x[:, 6:] * weights
    weighted = experts.weighted_bias_swiglu_impl(x, None, weights, False)
    return *found, (weighted - expected).abs().max().item()


def test_the_fused_swiglu_of_cuda_is_that_of_a_plain_model(ranks):
    ((loss_error, grad_error, grad_size, weighted_error),) = ranks(1, compare_as_on_cuda, ())
    assert loss_error < 1e-5 and weighted_error < 1e-6
    assert grad_error < 1e-4 * grad_size
