"""The step that a device decides on by itself, with torch's fused Adam, which CPU has too."""

from __future__ import annotations

from typing import Any

import pytest
from test_checkpoint import BF16, EXPERT, MOE, PIPELINE, REPLICATED, TENSOR, Run, same

LAYOUTS = [
    (1, []),
    (2, [BF16]),
    (2, [MOE, EXPERT]),
    (2, [REPLICATED, BF16]),
    (4, [TENSOR, PIPELINE, BF16]),
]


def fused_run(overrides: list[str], steps: int) -> Any:
    from megascale.optim.fused import fuse

    run = Run(overrides)
    fuse(run.optimizer.inner)
    run.train(range(steps))
    return run


def norms_and_state(overrides: list[str], fused: bool) -> Any:
    """After three steps: the norm by megatron-core and ours, and then losses, state and number of
    steps after a fourth."""
    import torch

    from megascale.optim.build import apply_gradients
    from megascale.optim.fused import gradient_norm

    run = fused_run(overrides, 0) if fused else Run(overrides)
    losses, core = run.train(range(3)), run.optimizer.core
    core.prepare_grads()
    norms = float(core.get_grad_norm()), float(gradient_norm(core, run.ranks.device))
    apply_gradients(run.model, run.optimizer, 64, 1.0, torch.tensor(True))
    return norms, losses, run.state(), run.optimizer.steps


@pytest.mark.parametrize("world, overrides", LAYOUTS, ids=str)
def test_a_fused_step_is_the_plain_step(ranks: Any, world: int, overrides: list[str]) -> None:
    import torch

    both = [ranks(world, norms_and_state, overrides, fused) for fused in (False, True)]
    for plain, fused in zip(*both):
        for norm, ours in (plain[0], fused[0]):
            assert ours == pytest.approx(norm, rel=1e-6) and norm > 0
        assert fused[1] == pytest.approx(plain[1], rel=1e-5)
        assert plain[3] == fused[3] == 4
        for key, right in plain[2].items():
            torch.testing.assert_close(fused[2][key], right, rtol=1e-4, atol=1e-6)


def left_alone(overrides: list[str], why: str) -> bool:
    """Whether a step after three others changes nothing, and its update is reported as skipped."""
    import torch

    from megascale.optim.build import apply_gradients

    run = fused_run(overrides, 3)
    before, steps = run.state(), run.optimizer.steps
    if why == "gradient":
        next(run.model.parameters()).main_grad.fill_(float("nan"))
    run.optimizer.core.zero_grad()
    good = torch.tensor(why != "loss")
    norm, stepped = apply_gradients(run.model, run.optimizer, 64, 1.0, good)
    assert bool(norm.isfinite()) == (why == "loss")
    unchanged = same(before, run.state()) and run.optimizer.steps == steps == 3
    run.train(range(3, 4))  # and the next one is taken
    return unchanged and not stepped and not same(before, run.state())


@pytest.mark.parametrize("why", ["loss", "gradient"])
@pytest.mark.parametrize("world, overrides", [(1, []), (2, [BF16])], ids=str)
def test_a_step_that_is_not_finite_changes_nothing(
    ranks: Any, world: int, overrides: list[str], why: str
) -> None:
    assert all(ranks(world, left_alone, overrides, why))


def continued(folder: str, overrides: list[str], saves: bool) -> Any:
    """Losses of the steps after the second and the state then; the second is saved or loaded."""
    run = fused_run(overrides, 0)
    if saves:
        run.train(range(2))
        run.save(run.saver(folder), 2)
    else:
        run.load(folder)
    assert run.optimizer.steps == 2
    return run.train(range(2, 4)), run.state()


def test_a_fused_run_resumes_bit_by_bit(ranks: Any, tmp_path: Any) -> None:
    first = ranks(2, continued, str(tmp_path), [BF16], True)
    again = ranks(2, continued, str(tmp_path), [BF16], False)
    assert first[0][0] == again[0][0] and same(first[0][1], again[0][1])
