"""Growth inside a run: the small one, the grown one, and what lies between. Without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megascale.checkpoint.load import read_manifest
from megascale.config import RunConfig, StartConfig, parse_config
from megascale.errors import UserError
from megascale.growth.operators import OPERATORS, Growth, grown_model
from megascale.run.origin import origin_of


def small_and_grown(config: RunConfig) -> tuple[RunConfig, RunConfig, Growth]:
    """The two runs of a finalized config with `growth`: of the small model, of the grown one.

    The small model keeps the schedule of the whole, of which it sees the beginning.
    """
    growth = config.growth
    assert growth is not None
    base = Path(config.run_dirs[0])
    small = replace(
        config,
        growth=None,
        run_dir=str(base),
        train=replace(config.train, tokens=growth.at_tokens),
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


def require_growth(config: RunConfig, growth: Growth, at_tokens: int) -> None:
    """Raise UserError where the checkpoint that a run begins with was grown in another way."""
    folder = config.start.checkpoint or ""
    origin = origin_of(Path(folder))
    if origin is None:
        return
    (parent,) = origin.parents
    small = parse_config(read_manifest(folder).position.config, where=folder)
    if origin.made_by != command_of(growth) or not _trained_for(small, at_tokens):
        raise UserError(
            f"growth was '{origin.made_by}' after {parent.tokens_seen:,} tokens, in {folder}, and "
            f"would be '{command_of(growth)}' after {at_tokens:,} tokens now; set it back, or take "
            "another run_dir"
        )


def _trained_for(small: RunConfig, at_tokens: int) -> bool:
    """Whether a small model's run was to end at `at_tokens`; before 0.2, after so many batches."""
    steps = small.train.stop_after_steps
    if steps is None:
        return small.train.tokens == at_tokens
    return steps == -(-at_tokens // small.data.global_batch_tokens)


def command_of(growth: Growth) -> str:
    """What a user would type to grow a checkpoint by it."""
    words = (
        f"megascale grow --operator {growth.operator} {OPERATORS[growth.operator].detail(growth)}"
    )
    noise = f" --noise {growth.noise:g}" * bool(growth.noise)
    return f"{words}{noise}{' --optimizer grow' * (growth.optimizer == 'grow')}"
