"""The loss without logits on tensor ranks, and that a step of the real model holds none."""

from __future__ import annotations

from typing import Any

import pytest

IDS, TOKENS, WIDTH = 257, 300, 24
MODEL = """
model: {num_layers: 1, hidden_size: 8, num_heads: 4, ffn_hidden_size: 8}
data: {sources: {a: {path: none}}, context_tokens: 512}
planner: {capacity_tokens: 512}
train: {precision: fp32, threads: 1}
device: cpu
"""


def drawn() -> tuple[Any, ...]:
    """(hidden states, weights of the ids, targets, mask), the same on all ranks."""
    import torch

    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(IDS, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, IDS, (TOKENS,), generator=generator)
    return hidden, weight, targets, (torch.arange(TOKENS) % 3 > 0).float()


def on_ranks(tensor: int, rows: int) -> Any:
    """(sum, gradient of hidden states, this rank's gradient of its rows), in chunks of 128."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from megascale.config import finalize, parse_config
    from megascale.model import counts
    from megascale.model.linear_cross_entropy import VocabularyPart, linear_cross_entropy
    from megascale.model.vocabulary import ids_among
    from megascale.runtime import distributed

    distributed.start(finalize(parse_config(MODEL, [f"parallel.tensor={tensor}"]), {"a": 999}, IDS))
    first = parallel_state.get_tensor_model_parallel_rank() * rows
    group = parallel_state.get_tensor_model_parallel_group()
    part = VocabularyPart(rows, ids_among(rows, first, IDS), first, group)
    hidden, weight, targets, mask = drawn()
    held = torch.full((rows, WIDTH), 9.0, dtype=torch.float64)
    held[: part.known] = weight[first : first + part.known]
    hidden.requires_grad_()
    held.requires_grad_()
    usual, counts.LOSS_CHUNK_BYTES = counts.LOSS_CHUNK_BYTES, 1
    try:
        copied = copy_to_tensor_model_parallel_region(hidden)
        loss = linear_cross_entropy(copied, held, targets, mask, part)
    finally:
        counts.LOSS_CHUNK_BYTES = usual
    loss.backward()
    return loss.item(), hidden.grad.numpy(), held.grad.numpy()


@pytest.mark.parametrize(("tensor", "rows"), [(2, 129), (2, 160), (4, 129)])
def test_tensor_ranks_agree_with_all_logits_in_fp64(ranks: Any, tensor: int, rows: int) -> None:
    """Also where a rank has fewer ids than rows, or none."""
    import numpy as np
    import torch

    hidden, weight, targets, mask = drawn()
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (losses * mask).sum().backward()
    expected = np.zeros((tensor * rows, WIDTH))
    expected[:IDS] = weight.grad.numpy()
    for rank, (loss, for_hidden, for_rows) in enumerate(ranks(tensor, on_ranks, tensor, rows)):
        assert loss == pytest.approx((losses * mask).sum().item(), rel=1e-12)
        np.testing.assert_allclose(for_hidden, hidden.grad.numpy(), rtol=1e-12, atol=1e-12)
        held = expected[rank * rows : (rank + 1) * rows]
        np.testing.assert_allclose(for_rows, held, rtol=1e-12, atol=1e-12)


def largest_tensor(overrides: tuple[str, ...]) -> tuple[int, int]:
    """(most elements of a tensor that a step's passes and an evaluation make, rows of a rank)."""
    import numpy as np
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from megascale.config import finalize, parse_config
    from megascale.mesh.packing import TokenSequence, pack
    from megascale.model import counts
    from megascale.model.build import build_model, pack_multiple
    from megascale.runtime import distributed
    from megascale.training.step import Learner, evaluate, run_micro_batches

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
            made = function(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else (made,):
                if isinstance(one, torch.Tensor):
                    Largest.elements = max(Largest.elements, one.numel())
            return made

    config = finalize(parse_config(MODEL, overrides), {"a": 999}, 2000)
    ranks = distributed.start(config)
    model = build_model(config, ranks)
    learner = Learner(config, ranks, model, None)
    ids = np.arange(513)
    batch = pack(
        [TokenSequence(ids[:-1], ids[1:])], 0, pack_multiple(config, ranks.device), ranks.device
    )
    usual, counts.LOSS_CHUNK_BYTES = counts.LOSS_CHUNK_BYTES, 1
    try:
        with Largest():
            run_micro_batches(learner, [batch], 1)
            evaluate(learner, [batch], 1)
    finally:
        counts.LOSS_CHUNK_BYTES = usual
    return Largest.elements, counts.padded_vocab_size(config.model, config.parallel.tensor)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_no_pass_makes_the_logits_of_all_tokens(ranks: Any, tied: str) -> None:
    """512 tokens and 2,000 ids: the largest tensor has the logits of 128 tokens."""
    (found,) = ranks(1, largest_tensor, (f"model.tied_embeddings={tied}",))
    assert found[0] == 128 * 2000
    for most, rows in ranks(2, largest_tensor, (f"model.tied_embeddings={tied}",
                                                "parallel.tensor=2")):  # fmt: skip
        assert most == 128 * rows // 2
