"""SOAP on real ranks: dealt out it does what one rank does, in the memory that the plan says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from crash_drill import curve
from test_checkpoint import BF16, EXPERT, MOE, PIPELINE, REPLICATED, TENSOR, Run, same
from test_train import train
from tiny_corpus import tiny_config

SOAP = ["optim.name=soap", "optim.soap_refresh_steps=2", "optim.schedule=[{lr: 0.01}]"]
UNCLIPPED = "optim.clip_grad_norm=0"


def trained(overrides: list[str], steps: int) -> Any:
    """State and losses after some steps."""
    run = Run([*SOAP, *overrides])
    losses = run.train(range(steps))
    return run.state(), losses


@pytest.mark.parametrize(
    "overrides",
    [[], [MOE, EXPERT, BF16], [TENSOR, BF16]],
    ids=lambda overrides: " ".join(overrides) or "fp32",
)
def test_dealt_out_or_on_every_rank_it_is_the_same(ranks: Any, overrides: list[str]) -> None:
    """Bit by bit, without clipping, whose norm is summed in another order."""
    world = 2 if TENSOR not in overrides and MOE not in overrides else 4
    dealt = ranks(world, trained, [UNCLIPPED, *overrides], 5)[0]
    whole = ranks(world, trained, [UNCLIPPED, REPLICATED, *overrides], 5)[0]
    assert same(dealt[0], whole[0]) and dealt[1] == whole[1]


@pytest.mark.parametrize(
    "world, overrides, max_dim, within",
    [
        (3, [], 0, 1e-4),
        (2, [MOE, EXPERT], 0, 1e-4),
        (3, [], 100, 5e-3),
        (2, [PIPELINE], 100, 5e-3),
        (2, [MOE, EXPERT], 100, 5e-3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_layout_trains_the_same_model(
    ranks: Any, world: int, overrides: list[str], max_dim: int, within: float
) -> None:
    """Bases to a few thousandths only: where a gradient has next to nothing, what is an eigenvector
    of the averages is a matter of rounding, and Adam steps as far there as elsewhere. Not with
    tensor ranks, each of which has bases of its own."""
    common = [f"optim.soap_max_dim={max_dim}", *(o for o in overrides if o == MOE)]
    ((_, expected),) = ranks(1, trained, common, 8)
    for _, losses in ranks(world, trained, [*common, *overrides], 8):
        np.testing.assert_allclose(losses[:2], expected[:2], rtol=1e-6)
        np.testing.assert_allclose(losses, expected, rtol=within)


def test_options_change_it(ranks: Any) -> None:
    (plain,) = [told[1] for told in ranks(1, trained, [], 6)]
    for option in ("soap_max_dim=0", "soap_refresh_steps=1", "beta1=0.5", "name=adamw"):
        (told,) = ranks(1, trained, [f"optim.{option}"], 6)
        assert told[1] != plain, option


def state_bytes(overrides: list[str]) -> tuple[int, int, int]:
    """(pipeline stage, bytes of state and master weights on this rank, what the plan says of the
    fullest of the stage)."""
    from megascale.config import Layout
    from megascale.optim.optimizer_kind import find_optimizer

    run = Run([*SOAP, *overrides])
    held = 0
    for inner in run.optimizer.inner:
        inner.init_state_fn(inner.optimizer, inner.config)
        for weight, state in inner.optimizer.state.items():
            tensors = [*state.values(), *([weight] if inner.config.bf16 else [])]
            held += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    layout = Layout.of(run.config, run.ranks.world)
    stage = layout.pipeline - 1 if run.ranks.is_last_stage else 0
    said = find_optimizer(run.config.optim.name).state_bytes(run.config, layout, stage)
    return stage, held, said


@pytest.mark.parametrize(
    "world, overrides",
    [
        (3, [BF16]),
        (2, [REPLICATED]),
        (4, [MOE, EXPERT]),
        (4, [TENSOR, PIPELINE, "model.qk_norm=true"]),
        (4, [PIPELINE, "model.tied_embeddings=false"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_memory_is_what_the_plan_says(ranks: Any, world: int, overrides: list[str]) -> None:
    told = ranks(world, state_bytes, ["optim.soap_max_dim=100", *overrides])
    for stage in {stage for stage, _, _ in told}:
        held, said = zip(*(row[1:] for row in told if row[0] == stage))
        assert max(held) == said[0] and min(held) > 0.4 * said[0]


def broken_step(overrides: list[str]) -> bool:
    """Whether a step with an infinite gradient leaves everything as it was."""
    import torch

    from megascale.optim.build import apply_gradients

    run = Run([*SOAP, *overrides])
    run.train(range(3))
    before = run.state()
    weight = next(run.model.parameters())
    weight.main_grad.fill_(float("inf"))
    _, stepped = apply_gradients(run.model, run.optimizer, 64, 1.0, torch.tensor(True))
    return not stepped and same(before, run.state())


def test_a_step_that_is_not_finite_changes_nothing(ranks: Any) -> None:
    assert ranks(2, broken_step, [])[0]


def refused(folder: str, overrides: list[str]) -> str:
    """The line that loading is refused with."""
    from megascale.errors import UserError

    run = Run([*SOAP, *overrides])
    with pytest.raises(UserError) as caught:
        run.load(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "world, overrides", [(2, [TENSOR]), (1, ["optim.name=adamw"]), (1, ["optim.soap_max_dim=40"])]
)
def test_what_bases_do_not_fit_is_refused(
    ranks: Any, tmp_path: Any, world: int, overrides: list[str]
) -> None:
    ranks(1, saved, str(tmp_path))
    told = ranks(world, refused, str(tmp_path), overrides)
    assert "optimizer.state.left_" in told[0] and "and optim (with SOAP, parallel" in told[0]
    assert "\n" not in told[0]


def saved(folder: str) -> None:
    """Save a run of one rank."""
    run = Run(SOAP)
    run.train(range(2))
    run.save(run.saver(folder), 2)


def test_a_resumed_run_is_the_run_that_was_not_stopped(ranks: Any, tmp_path: Any) -> None:
    """Bit by bit, over a refresh of the bases."""
    config, calm, stopped = tiny_config(tmp_path / "corpus"), tmp_path / "calm", tmp_path / "run"
    words = SOAP[:2]
    assert train(ranks, 2, config, calm, *words)[0] == 0
    assert train(ranks, 2, config, stopped, *words, "train.stop_after_steps=3")[0] == 0
    assert train(ranks, 2, config, stopped, *words, "--resume", "latest")[0] == 0
    assert len(curve(calm)) > 4
    assert curve(calm).keys() == curve(stopped).keys()
    for step, row in curve(calm).items():
        assert (row["loss"], row["grad_norm"]) == tuple(
            curve(stopped)[step][name] for name in ("loss", "grad_norm")
        )
