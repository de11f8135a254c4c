"""Padded rows of the vocabulary: in no softmax, in no gradient, in no checkpoint.

The oracle is a plain PyTorch model of the ids alone, in fp64. Every padded row of ours holds
numbers that would show wherever they are read, and logits lie low by a common shift of about -18.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

VOCAB = 257
MODEL = """
model: {num_layers: 2, hidden_size: 36, num_heads: 4, head_dim: 8, init_std: 0.3}
data: {sources: {a: {path: none}}, context_tokens: 32}
planner: {capacity_tokens: 128}
train: {precision: fp32, threads: 1}
device: cpu
"""
UNTIED = "model.tied_embeddings=false"


class Model:
    """The model on this rank, and one batch that all ranks run."""

    def __init__(self, overrides: tuple[str, ...]) -> None:
        from megascale.config import finalize, parse_config
        from megascale.mesh.packing import TokenSequence, pack
        from megascale.model.build import build_model, pack_multiple
        from megascale.runtime import distributed
        from megascale.training.step import Learner

        self.config = finalize(parse_config(MODEL, overrides), {"a": 1000}, VOCAB)
        self.ranks = distributed.start(self.config)
        self.model = build_model(self.config, self.ranks)
        self.learner = Learner(self.config, self.ranks, self.model, None)
        drawn = np.random.default_rng(0)
        self.ids = [drawn.integers(0, VOCAB, n + 1) for n in (31, 1, 17)]
        self.ids[0][:3] = 0, VOCAB - 1, VOCAB - 1
        bag = [TokenSequence(ids[:-1], ids[1:]) for ids in self.ids]
        self.batch = pack(
            bag, 256, pack_multiple(self.config, self.ranks.device), self.ranks.device
        )
        self.tokens = sum(len(ids) - 1 for ids in self.ids)

    def padded(self) -> list[tuple[Any, int]]:
        """(weight of the vocabulary, its rows that belong to ids) on this rank."""
        from megatron.core import parallel_state

        from megascale.model.vocabulary import VOCABULARY

        weights = [w for name, w in self.model.named_parameters() if name.endswith(VOCABULARY)]
        rank = parallel_state.get_tensor_model_parallel_rank()
        return [(w, min(max(VOCAB - rank * len(w), 0), len(w))) for w in weights]

    def spoil(self) -> None:
        """Logits that lie low, and padded rows that would change every softmax they were in."""
        from megascale.checkpoint.boxes import boxes
        from megascale.model.vocabulary import VOCABULARY

        for box in boxes(self.model, None):
            if box.key in VOCABULARY:
                box.live()[:, 0] += 30
            if box.key == "decoder.final_layernorm.weight":
                box.live()[0] = -0.1
        for weight, known in self.padded():
            weight.data[known:] = 9

    def plain(self) -> Any:
        """The oracle with the weights of this one rank."""
        from plain_gpt import PlainGpt

        plain = PlainGpt(self.config.model)
        plain.load_megatron(self.model.chunks[0].module.state_dict())
        return plain.double()


def losses_of(logits_of: Any, ids: list[np.ndarray]) -> Any:
    """Losses of all tokens in fp64, from a function that gives the logits of one sequence."""
    import torch

    return torch.cat(
        [
            torch.nn.functional.cross_entropy(
                logits_of(torch.tensor(row[None, :-1]))[0],
                torch.tensor(row[1:]),
                reduction="none",
            )
            for row in ids
        ]
    )


def oracle(overrides: tuple[str, ...], without_attention: bool = False) -> Any:
    """(losses per token, mean logit, gradients of the summed loss for the rows of ids)."""
    model = Model(overrides)
    model.spoil()
    if without_attention:
        silence(model)
    plain = model.plain()
    losses = losses_of(plain, model.ids)
    losses.sum().backward()
    gradients = {"embedding.word_embeddings.weight": plain.embedding.weight.grad.numpy()}
    if not model.config.model.tied_embeddings:
        gradients["output_layer.weight"] = plain.output_layer.weight.grad.numpy()
    shift = plain(model.batch.tokens_T[None, :31]).mean().item()
    return losses.detach().numpy(), shift, gradients


def silence(model: Model) -> None:
    """No attention, whose rotary tables are rounded to fp32."""
    for name, weight in model.model.named_parameters():
        if "linear_qkv" in name:
            weight.data.zero_()


def trained(overrides: tuple[str, ...]) -> Any:
    """(mean loss in evaluation, that in training, gradients of ids by place, sums of padding)."""
    from megatron.core.distributed import finalize_model_grads

    from megascale.checkpoint.boxes import boxes
    from megascale.training.step import evaluate, run_micro_batches

    model = Model(overrides)
    model.spoil()
    loss_sum, tokens = evaluate(model.learner, [model.batch], 1)
    model.model.zero_grad_buffer()
    trained_sum, _ = run_micro_batches(model.learner, [model.batch], 1)
    finalize_model_grads(model.model.chunks)
    padding = [weight.main_grad[known:].abs().sum().item() for weight, known in model.padded()]
    ids = {id(weight) for weight, _ in model.padded()}
    parts = [
        (box.key, box.offset[0], box.holder().main_grad[: box.shape[0]].numpy().copy())
        for box in boxes(model.model, None)
        if id(box.holder()) in ids
    ]
    reported = float(trained_sum) / model.tokens if model.ranks.reports_loss else None
    assert all(weight.main_grad.isfinite().all() for weight, _ in model.padded())
    return loss_sum / tokens, reported, parts, padding


def trained_as_on_cuda(overrides: tuple[str, ...]) -> Any:
    """`trained`, with logits of as many rows as one CUDA rank computes: 320 for 257 ids."""
    import torch

    from megascale.model import build, vocabulary

    honest = build.exclude_padding
    build.exclude_padding = lambda model, num_ids, _: vocabulary.exclude_padding(
        model, num_ids, torch.device("cuda")
    )
    try:
        return trained(overrides)
    finally:
        build.exclude_padding = honest


LAYOUTS = [
    (1, ("model.vocab_multiple=1",)),
    (1, ()),
    (1, ("train.recompute=full",)),
    (2, ("parallel.tensor=2", "model.vocab_multiple=1")),
    (2, ("parallel.tensor=2",)),
    (2, ("parallel.tensor=2", "parallel.sequence_parallel=false", "model.vocab_multiple=1024")),
    (4, ("parallel.tensor=4",)),
    (2, ("parallel.pipeline=2",)),
    (4, ("parallel.tensor=2", "parallel.pipeline=2", "model.vocab_multiple=1024")),
]


@pytest.mark.parametrize("tied", [(), (UNTIED,)], ids=["tied", "untied"])
def test_losses_and_gradients_are_those_of_the_ids_alone(ranks: Any, tied: tuple[str, ...]) -> None:
    """Also where a tensor rank holds nothing but padding: 257 ids in 384 rows on 4 ranks."""
    losses, shift, gradients = ranks(1, oracle, tied)[0]
    assert shift < -15 and 4 < losses.mean() < 12, (shift, losses.mean())
    runs = [(world, trained, overrides) for world, overrides in LAYOUTS]
    runs.append((1, trained_as_on_cuda, ()))
    for world, function, overrides in runs:
        told = ranks(world, function, (*tied, *overrides))
        for loss, reported, parts, padding in told:
            assert loss == pytest.approx(losses.mean(), rel=1e-5), overrides
            assert reported is None or reported == pytest.approx(losses.mean(), rel=1e-5)
            assert padding == [0.0] * len(padding)
            for key, row, part in parts:
                expected = gradients[key][row : row + len(part)]
                np.testing.assert_allclose(part, expected, rtol=1e-3, atol=1e-5)
        assert any(padding for _, _, _, padding in told)
        rows = {(key, row + i) for _, _, parts, _ in told for key, row, part in parts
                for i in range(len(part))}  # fmt: skip
        assert len(rows) == VOCAB * len(gradients)


def in_fp64(overrides: tuple[str, ...]) -> Any:
    """Losses per token from this model's own logits, with weights and arithmetic in fp64."""
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model = Model(overrides)
    model.spoil()
    silence(model)
    batch, gpt = model.batch, model.model.chunks[0].module.double().eval()
    with torch.no_grad():
        part = gpt(
            input_ids=batch.tokens_T[None],
            position_ids=batch.segments.positions_T[None],
            attention_mask=None,
            packed_seq_params=batch.segments,
        )
        logits = gather_from_tensor_model_parallel_region(part)[0]
    assert logits.dtype == torch.float64 and logits.softmax(-1)[:, VOCAB:].sum() == 0
    targets, kept = batch.targets_T, batch.loss_mask_T.bool()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")[kept].numpy()


@pytest.mark.parametrize("tied", [(), (UNTIED,)], ids=["tied", "untied"])
def test_losses_agree_to_1e9_in_fp64(ranks: Any, tied: tuple[str, ...]) -> None:
    expected, _, _ = ranks(1, oracle, tied, True)[0]
    for world, overrides in LAYOUTS:
        if "parallel.pipeline=2" not in overrides:
            for found in ranks(world, in_fp64, (*tied, *overrides)):
                np.testing.assert_allclose(found, expected, rtol=1e-9)


def drawn_rows(overrides: tuple[str, ...]) -> Any:
    """The initial rows of ids, by place, and the largest number in a padded row."""
    from megascale.checkpoint.boxes import boxes
    from megascale.model.vocabulary import VOCABULARY

    model = Model(overrides)
    rows = {
        (box.key, box.offset[0] + i): row.numpy().copy()
        for box in boxes(model.model, None)
        if box.key in VOCABULARY
        for i, row in enumerate(box.live())
    }
    return rows, [weight[known:].abs().sum().item() for weight, known in model.padded()]


def test_initial_rows_do_not_depend_on_the_padding(ranks: Any) -> None:
    """257 x 36 numbers are no multiple of 16, in which torch draws them."""
    expected, _ = ranks(1, drawn_rows, (UNTIED, "model.vocab_multiple=1"))[0]
    assert len(expected) == 2 * VOCAB and all(row.any() for row in expected.values())
    for world, overrides in [(1, ()), (2, ("parallel.tensor=2", "model.vocab_multiple=512"))]:
        told = ranks(world, drawn_rows, (UNTIED, *overrides))
        found = {place: row for rows, _ in told for place, row in rows.items()}
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[place], row) for place, row in expected.items())
        assert all(size == 0 for _, padding in told for size in padding)
