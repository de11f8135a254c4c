"""The optimizers by name, a record each: what a config must know of them, without torch.

A new optimizer is a file beside those in `optim`, with its `OPTIMIZER` (`optim.optimizer_kind`),
and a record here: validation, defaults, memory, checkpoints and growth follow from the two records.
Only options of its own are more: they are fields of `OptimConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizerInfo:
    """What configs, warnings and messages say of one optimizer."""

    title: str
    """Its name in messages."""
    module: str
    """The module that has the rest, as its `OPTIMIZER`."""
    lr: float
    """Default of `optim.lr`."""
    beta1: float
    """Default of `optim.beta1`."""
    is_flat: bool = False
    """It updates element by element, so `optim.distributed_optimizer` may cut its state into equal
    ranges of flattened weights. Only AdamW: megatron-core's distributed optimizer takes no other.
    If false, a rank keeps whole weights."""
    options: Mapping[str, int] = field(default_factory=dict)
    """Options of `optim` that have an effect with this optimizer alone, each with its least
    value, 0 or 1."""
    means: Mapping[str, int] = field(default_factory=dict)
    """State tensors that growth can grow: each the mean of the gradients to this power, element by
    element. Empty where the state is of another kind."""
    resume_keeps: tuple[str, ...] = ()
    """Options that a resume must keep for the state to fit, apart from those of the model, of
    `optim`, and `train.precision`."""


OPTIMIZERS: dict[str, OptimizerInfo] = {
    "adamw": OptimizerInfo(
        title="AdamW",
        module="megascale.optim.adamw",
        lr=3e-4,
        beta1=0.9,
        is_flat=True,
        means={"exp_avg": 1, "exp_avg_sq": 2},
    ),
    "soap": OptimizerInfo(
        title="SOAP",
        module="megascale.optim.soap",
        lr=3e-3,
        beta1=0.95,
        options={"soap_refresh_steps": 1, "soap_max_dim": 0},
        resume_keeps=("parallel.tensor", "model.vocab_multiple"),
    ),
}
"""By the name that `optim.name` gives."""


def own_options(least: int) -> str:
    """Options of single optimizers with this least value, separated by spaces."""
    options = [one.options for one in OPTIMIZERS.values()]
    return " ".join(name for of in options for name, lowest in of.items() if lowest == least)


def titles_of_growable() -> str:
    """The optimizers of which the state can grow, for messages."""
    return " or ".join(one.title for one in OPTIMIZERS.values() if one.means)
