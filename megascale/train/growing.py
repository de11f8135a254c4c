"""Growth inside a run: the small one, the grown one, and what lies between. Without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megascale.config import RunConfig, StartConfig
from megascale.corpus.batches import num_steps
from megascale.errors import UserError
from megascale.growth.model import Growth, grown_model
from megascale.train.start import origin_of


def small_and_grown(config: RunConfig) -> tuple[RunConfig, RunConfig, Growth]:
    """The two runs of a finalized config with `growth`: of the small model, of the grown one."""
    growth = config.growth
    assert growth is not None
    base = Path(config.run_dirs[0])
    steps = num_steps(config.data, growth.at_tokens)
    small = replace(
        config,
        growth=None,
        run_dir=str(base),
        train=replace(config.train, stop_after_steps=steps),
        eval=replace(config.eval, sample_prompt=None),
    )
    what = Growth(
        growth.operator,
        growth.factor,
        growth.noise,
        mask_tokens=growth.mask_tokens,
        optimizer=growth.optimizer,
        seed=config.seed,
    )
    grown = replace(
        config,
        growth=None,
        model=grown_model(config.model, what),
        start=StartConfig(
            checkpoint=str((base / "grown").resolve()),
            optimizer="keep" if growth.optimizer == "grow" else "reset",
        ),
    )
    return small, grown, what


def require_growth(config: RunConfig, growth: Growth, base_steps: int) -> None:
    """Raise UserError where the checkpoint that a run begins with was grown in another way."""
    folder = config.start.checkpoint or ""
    origin = origin_of(Path(folder))
    if origin is None:
        return
    (parent,) = origin.parents
    if (origin.made_by, parent.step) != (command_of(growth), base_steps):
        raise UserError(
            f"growth was '{origin.made_by}' after step {parent.step}, in {folder}, and would be "
            f"'{command_of(growth)}' after step {base_steps} now; set it back, or take another "
            "run_dir"
        )


def command_of(growth: Growth) -> str:
    """What a user would type to grow a checkpoint by it."""
    words = f"megascale grow --operator {growth.operator} {_detail(growth)}"
    noise = f" --noise {growth.noise:g}" * bool(growth.noise)
    return f"{words}{noise}{' --optimizer grow' * (growth.optimizer == 'grow')}"


def _detail(growth: Growth) -> str:
    if growth.operator == "random":
        return f"--factor {growth.factor} --mask-tokens {growth.mask_tokens}"
    if growth.operator == "resize":
        return f"--vocab {growth.vocab_size}"
    if growth.operator == "learn":
        return f"--factor {growth.factor} --steps {growth.steps}"
    if growth.operator != "upcycle" or growth.moe is None:
        return f"--factor {growth.factor}"
    return f"--experts {growth.moe.num_experts} --top-k {growth.moe.top_k}" + (
        f" --attention-experts {growth.moe.attention_experts}"
    ) * (growth.moe.attention_experts > 1)
