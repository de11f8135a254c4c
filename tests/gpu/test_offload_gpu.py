"""Activations in pinned host memory on CUDA; the twin of tests/unit/test_offload.py and
tests/multi/test_offload_ranks.py."""

import numpy as np
import pytest
import torch

from megascale.config import finalize, parse_config
from megascale.mesh.offload import Offloader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, HIDDEN, NUM_LAYERS = 8192, 1024, 8
RATIOS = (0, 0.5, 1)


class Block(torch.nn.Module):
    """Saves its input, a product and its activation: 9 * HIDDEN values per token."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(HIDDEN, 4 * HIDDEN) / 100)
        self.down = torch.nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN) / 100)

    def forward(self, hidden_states):
        return hidden_states + torch.nn.functional.silu(hidden_states @ self.up) @ self.down


def test_memory_falls_with_the_ratio_and_gradients_are_the_same():
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    layers = [Block().to(device) for _ in range(NUM_LAYERS)]
    weights = [weight for layer in layers for weight in layer.parameters()]
    offloader = Offloader(layers, device)
    start, expected, held, saved = torch.randn(TOKENS, HIDDEN, device=device), None, [], 0
    for ratio in (*RATIOS, *RATIOS):
        before = torch.cuda.memory_allocated()
        x = start
        with offloader.micro_batch(ratio):
            for layer in layers:
                x = layer(hidden_states=x)
        held.append(torch.cuda.memory_allocated() - before)
        grads = torch.autograd.grad(x.square().mean(), weights)
        expected = expected or grads
        assert all(torch.equal(grad, other) for grad, other in zip(grads, expected))
        del grads, x
        blocks, traffic = offloader.blocks, offloader.take_traffic()
        assert blocks.num_free == blocks.num_blocks
        saved = max(saved, traffic.saved_bytes)
    # The inner layers' activations leave, and with them most of the memory.
    assert saved == (NUM_LAYERS - 2) * 9 * TOKENS * HIDDEN * 4
    for ratio, used in zip((*RATIOS, *RATIOS), held):
        assert held[0] - used == pytest.approx(ratio * saved, abs=4 * TOKENS * HIDDEN * 4)
    assert blocks.num_blocks * (32 << 20) <= saved + (32 << 20)


MODEL = """
model: {num_layers: 6, hidden_size: 512, num_heads: 8, num_kv_heads: 2}
data: {sources: {random: {path: none}}, context_tokens: 8192}
train: {precision: bf16}
"""


def train_at_ratios():
    """For each ratio: gradients, and bytes held between forward and backward."""
    from megascale.mesh.packing import TokenSequence, pack
    from megascale.model.build import build_model
    from megascale.runtime import distributed

    config = finalize(parse_config(MODEL), {"random": 10000}, 257)
    ranks = distributed.start(config)
    model = build_model(config, ranks)
    ids = [np.random.default_rng(n).integers(0, 257, n + 1) for n in (6000, 192, 2000)]
    batch = pack([TokenSequence(x[:-1], x[1:]) for x in ids], 256, 1, ranks.device)
    found = []
    for ratio in RATIOS:
        model.zero_grad_buffer()
        before = torch.cuda.memory_allocated()
        with model.offloader.micro_batch(ratio):
            loss_T = model.chunks[0](
                input_ids=batch.tokens_T[None],
                position_ids=None,
                attention_mask=None,
                labels=batch.targets_T[None],
                packed_seq_params=batch.segments,
            )
        held = torch.cuda.memory_allocated() - before
        loss_T.sum().backward()
        grads = [weight.main_grad.float().cpu().numpy() for weight in model.parameters()]
        found.append((grads, held))
        del loss_T
    return found


def test_a_real_model_holds_less_and_learns_the_same(ranks):
    (found,) = ranks(1, train_at_ratios)
    held = [size for _, size in found]
    assert held[2] < 0.85 * held[1] and held[1] < 0.85 * held[0]
    for grads, _ in found[1:]:
        for grad, expected in zip(grads, found[0][0]):
            # Flash attention adds up in an order of its own.
            assert np.abs(grad - expected).max() <= 2e-2 * np.abs(expected).max()
