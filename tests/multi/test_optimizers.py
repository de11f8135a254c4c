"""An optimizer that is one file and one line: it trains, saves and resumes as the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from test_checkpoint import BF16, REPLICATED, TENSOR, UNPADDED, WIDE, Run, same
from test_checkpoint import loaded as loaded_run
from test_checkpoint import trained_and_saved as trained_and_saved_run
from test_soap_ranks import state_bytes as state_bytes_of
from toy_optimizer import INFO, Momentum

from megascale.config import finalize, parse_config
from megascale.config.optimizers import OPTIMIZERS
from megascale.errors import UserError

TOY = "optim.name=momentum"
REGISTERED = patch.dict(OPTIMIZERS, {"momentum": INFO})
"""In a rank too, which is a process that other tests use again."""


@REGISTERED
def trained_and_saved(folder: str, overrides: list[str], follow: range) -> Any:
    """`trained_and_saved` of test_checkpoint, with the toy."""
    return trained_and_saved_run(folder, [TOY, *overrides], follow)


@REGISTERED
def loaded(folder: str, overrides: list[str], follow: range) -> Any:
    """`loaded` of test_checkpoint, with the toy."""
    return loaded_run(folder, [TOY, *overrides], follow)


@REGISTERED
def state_bytes(overrides: list[str]) -> tuple[int, int, int]:
    """`state_bytes` of test_soap_ranks, with the toy."""
    return state_bytes_of([*overrides, TOY])


@pytest.mark.parametrize("overrides", [[], [BF16], [REPLICATED], [TENSOR]], ids=str)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    ranks: Any, tmp_path: Path, overrides: list[str]
) -> None:
    follow = range(2, 6)
    saved, losses = ranks(2, trained_and_saved, str(tmp_path), overrides, follow)[0]
    found, after = ranks(2, loaded, str(tmp_path), overrides, follow)[0]
    assert same(saved, found) and losses == after
    moments = [saved[key] for key in saved if key.startswith("optimizer.state.momentum.")]
    weights = [key for key in saved if not key.startswith("optimizer.")]
    assert len(moments) == len(weights) > 5 and all(moment.any() for moment in moments)
    assert not any("exp_avg" in key for key in saved)


def test_another_layout_and_padding_go_on_from_it(ranks: Any, tmp_path: Path) -> None:
    follow = range(2, 4)
    saved, losses = ranks(2, trained_and_saved, str(tmp_path), [WIDE], follow)[0]
    found, after = ranks(1, loaded, str(tmp_path), [UNPADDED], follow)[0]
    assert same(saved, found) and after == pytest.approx(losses, rel=1e-5)


@REGISTERED
def by_hand() -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights after three steps, and those that the rule gives from the gradients."""
    run = Run([TOY, "optim.schedule=[{lr: 0.01}]"])
    weights = dict(run.model.named_parameters())
    expected = {name: weight.detach().double() for name, weight in weights.items()}
    momentum = {name: 0.0 for name in weights}
    decayed = {id(w) for g in run.optimizer.core.param_groups if g["wd_mult"] for w in g["params"]}
    for step in range(3):
        run.train(range(step, step + 1))
        for name, weight in weights.items():
            momentum[name] = 0.8 * momentum[name] + weight.main_grad.double()
            decay = 0.01 * 0.1 if id(weight) in decayed else 0.0
            expected[name] = expected[name] * (1 - decay) - 0.01 * momentum[name]
    return {name: weight.detach().double() for name, weight in weights.items()}, expected


def test_it_follows_its_rule(ranks: Any) -> None:
    """Its beta1 is the default of its record."""
    import torch

    ((found, expected),) = ranks(1, by_hand)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_memory_is_what_the_plan_says(ranks: Any) -> None:
    told = ranks(2, state_bytes, [BF16])
    assert max(held for _, held, _ in told) == told[0][2] > 0


def test_configs_know_it_when_it_is_registered() -> None:
    text = "data: {sources: {a: {path: unused}}, context_tokens: 32}"
    with pytest.raises(UserError, match="optim.name must be one of adamw, soap; it is 'momentum'"):
        parse_config(text, [TOY])
    with REGISTERED:
        optim = finalize(parse_config(text, [TOY]), {"a": 1000}, 100).optim
        assert (optim.beta1, optim.schedule[0].lr) == (0.8, 0.05)
        with pytest.raises(UserError, match="grows AdamW's moments; optim.name = momentum has"):
            grown = [TOY, "growth={at_tokens: 10, optimizer: grow}", "train.tokens=100"]
            finalize(parse_config(text, grown), {"a": 1000}, 100)
        with pytest.raises(UserError, match="one of adamw, soap, momentum; it is 'sgd'"):
            parse_config(text, ["optim.name=sgd"])
    assert Momentum.__module__ == INFO.module
