"""The Step Law's numbers, and how a config takes them."""

import pytest

from megascale.config import dump_config, finalize, parse_config
from megascale.errors import UserError
from megascale.model.counts import count_parameters
from megascale.optim import growth_law, steplaw
from megascale.run.resume import compare_configs

BASE = """
model: {num_layers: 3, hidden_size: 96, num_heads: 3}
data: {sources: {web: {path: corpora/web}}, global_batch_tokens: steplaw}
optim: {lr: steplaw}
train: {tokens: 20M}
"""
LAYER = 4 * 96 * 96 + 3 * 96 * 256 + 2 * 96
PARAMETERS = 3 * LAYER + 96


def resolved(*overrides: str):
    return steplaw.resolve(parse_config(BASE, overrides))


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch"),
    [
        (60_000_000, 8 * 10**9, 5.588e-3, 0.262e6),
        (10**9, 10**11, 1.632e-3, 1.108e6),
        (7 * 10**9, 14 * 10**11, 9.17e-4, 4.999e6),
    ],
)
def test_the_table_of_the_paper(parameters: int, tokens: int, lr: float, batch: float) -> None:
    assert steplaw.peak_lr(parameters, tokens) == pytest.approx(lr, rel=5e-4)
    assert steplaw.batch_tokens(tokens) == pytest.approx(batch, rel=1e-3)


def test_how_the_law_scales() -> None:
    n, d = 10**9, 10**11
    assert steplaw.peak_lr(n, 10 * d) / steplaw.peak_lr(n, d) == pytest.approx(2.028, rel=5e-4)
    assert steplaw.peak_lr(10 * n, d) / steplaw.peak_lr(n, d) == pytest.approx(0.1936, rel=5e-4)
    assert steplaw.batch_tokens(10 * d) / steplaw.batch_tokens(d) == pytest.approx(3.724, rel=1e-4)
    assert steplaw.batch_tokens(1) == 1


@pytest.mark.parametrize(
    ("parameters", "tokens", "has_experts", "fitted"),
    [
        (10**9, 10**11, False, True), (6 * 10**7, 8 * 10**9, False, True),
        (1_073_741_824, 569 * 10**8, False, True), (7 * 10**9, 10**11, False, False),
        (10**9, 10**12, False, False), (10**6, 10**10, False, False),
        (10**9, 10**9, False, False), (2_150_612_992, 10**10, True, True),
        (2_150_612_992, 10**10, False, False), (10**10, 10**10, True, False),
    ],
)  # fmt: skip
def test_where_it_was_fitted(parameters, tokens, has_experts, fitted) -> None:
    """The settings that the authors released lie inside; larger, smaller and longer runs do not."""
    assert steplaw.is_fitted(parameters, tokens, has_experts) is fitted


def test_a_config_takes_the_numbers() -> None:
    config = resolved()
    assert config.optim.lr == steplaw.peak_lr(PARAMETERS, 20_000_000)
    assert config.data.global_batch_tokens == steplaw.batch_tokens(20_000_000)
    assert config.optim.min_lr == 1e-5
    final = finalize(config, {"web": 1000}, 257)
    assert count_parameters(final.model).non_embedding == PARAMETERS
    assert [one.lr for one in final.optim.schedule] == [config.optim.lr, 1e-5, 1e-5]


def test_the_vocabulary_does_not_matter() -> None:
    sizes = ("model.vocab_size=257", "model.vocab_size=100000", "model.tied_embeddings=false")
    assert {resolved(size).optim.lr for size in sizes} == {resolved().optim.lr}


def test_all_experts_count() -> None:
    config = resolved("model.moe={num_experts: 4, top_k: 1, ffn_hidden_size: 256}")
    all_experts = PARAMETERS + 3 * (3 * 3 * 96 * 256 + 4 * 96)
    assert config.optim.lr == steplaw.peak_lr(all_experts, 20_000_000)
    assert config.data.global_batch_tokens == resolved().data.global_batch_tokens


def test_numbers_that_are_given_stay() -> None:
    assert resolved("optim.min_lr=2e-5").optim.min_lr == 2e-5
    config = resolved("optim.lr=1e-3")
    assert (config.optim.lr, config.optim.min_lr) == (1e-3, None)
    assert resolved("data.global_batch_tokens=4Ki").data.global_batch_tokens == 4096
    plain = parse_config(BASE, ["optim.lr=1e-3", "data.global_batch_tokens=4Ki"])
    assert steplaw.resolve(plain) == plain


@pytest.mark.parametrize("curve", ["cosine", "infinite", "wsd", "constant"])
def test_every_curve_with_a_peak_takes_it(curve: str) -> None:
    config = finalize(resolved(f"optim.curve={curve}"), {"web": 1000}, 257)
    peak = steplaw.peak_lr(PARAMETERS, 20_000_000)
    assert max(one.lr for one in config.optim.schedule) == peak
    assert config.optim.schedule[-1].lr == (peak if curve == "constant" else 1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.curve=anneal", "set optim.lr to the last rate"),
        ("model.num_heads=0", "model.num_heads = 0 must be at least 1"),
        ("model.vocab_multiple=0", "model.vocab_multiple = 0 must be at least 1"),
        ("train.tokens=0", "train.tokens = 0 must be at least 1"),
        ("model.num_layers=-3", "model.num_layers = -3 must be at least 1"),
    ],
)
def test_what_the_law_cannot_be_asked(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(override)


def test_a_peak_and_segments_are_one_too_many() -> None:
    with pytest.raises(UserError, match="optim.lr and optim.schedule are both set"):
        finalize(resolved("optim.schedule=[{lr: 1.0}]"), {"web": 1000}, 257)


def test_a_resume_sees_the_numbers_that_the_run_had() -> None:
    """What a run writes down is resolved; its config file may go on saying steplaw."""
    run = finalize(resolved(), {"web": 1000}, 257)
    written = dump_config(run)
    assert "steplaw" not in written and parse_config(written) == run
    assert compare_configs(written, finalize(resolved(), {"web": 1000}, 257), 0) == []
    with pytest.raises(UserError, match="data.global_batch_tokens was"):
        compare_configs(written, finalize(resolved("train.tokens=40M"), {"web": 1000}, 257), 0)


@pytest.mark.parametrize(
    ("parameters", "tokens", "billions"),
    [(8, 15_000, 6.58), (7, 2_000, 11.11), (13, 2_000, 15.84), (70, 2_000, 42.48)],
)
def test_tokens_for_the_base_of_a_stack(parameters: int, tokens: int, billions: float) -> None:
    """The table of arXiv 2405.15319: Llama 3 and Llama 2, in billions."""
    d = growth_law.base_tokens(parameters * 10**9, tokens * 10**9)
    assert d / 1e9 == pytest.approx(billions, abs=0.006)


def test_compute_and_the_weak_fit() -> None:
    assert growth_law.compute_flops(7 * 10**9, 2 * 10**12) == pytest.approx(8.4e22)
    # log10 g = 1.01 * 9.845098 - 29.88 / 22.924279 - 7.36
    assert growth_law.fitted_growth_factor(7 * 10**9, 2 * 10**12) == pytest.approx(19.06, abs=0.01)
    assert growth_law.GROWTH_FACTOR == 4
