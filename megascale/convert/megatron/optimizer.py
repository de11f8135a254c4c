"""The state of AdamW in a Megatron checkpoint: its moments and its number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megascale.convert.megatron.names import Names
from megascale.convert.megatron.source import Source, named
from megascale.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTERS = ("param", "fp32_param", "master_param")
"""Names of fp32 weights: of `fully_reshardable` state, and of optimizers that are not cut."""
RESHARDABLE = "fully_reshardable"
FLAT = "optimizer.distributed."
"""In the names of state whose layout is that of the ranks that wrote it."""
DROP = "--optimizer drop imports the weights alone"
MOST_STEPS = 1 << 53
SETTINGS = ("lr", "max_lr", "betas", "eps", "weight_decay")
"""Of a parameter group: settings that a user must set again in `optim`."""


@dataclass(frozen=True)
class AdamState:
    """The part of the optimizer that an import keeps."""

    steps: int
    settings: Mapping[str, Any]
    """Learning rate, betas, eps and weight decay, if the checkpoint has them."""
    assumed_steps: bool
    """The checkpoint has no number of steps, so it is the number of iterations."""


def master_of(names: Names) -> str:
    """The name of the state with the weights in fp32; empty where there is none."""
    return next((name for name in MASTERS if name in names.states), "")


def adam_state(source: Source, names: Names, iteration: int) -> AdamState | None:
    """The state of AdamW; None where the checkpoint has no optimizer.

    Raises UserError for state of other optimizers, and in layouts that depend on the ranks.
    """
    optimizer = source.common.get("optimizer")
    keys = source.index.metadata.state_dict_metadata
    flat = any(FLAT in key for key in keys)
    kinds = {str(kind) for kind in named(optimizer, "param_state_sharding_type")}
    if flat or kinds - {RESHARDABLE}:
        kind = ", ".join(sorted(kinds)) or "dp_reshardable or fully_sharded_model_space"
        raise UserError(
            f"the optimizer's state is stored as {kind[:60]}, in the layout of the ranks that "
            f"wrote it; load it in Megatron with that layout and save it with "
            f"--dist-ckpt-optim-fully-reshardable, or: {DROP}"
        )
    states = names.states - set(MASTERS)
    if not states:
        return None
    if states != set(MOMENTS):
        listed = ", ".join(sorted(states))
        raise UserError(
            f"the optimizer keeps {listed[:100]}, and AdamW keeps {' and '.join(MOMENTS)}; {DROP}"
        )
    steps = {one for name in ("step", "common_step") for one in _counts(optimizer, name)}
    if len(steps) > 1:
        raise UserError(f"parts of the optimizer took {sorted(steps)} steps; {DROP}")
    count = next(iter(steps), iteration)
    if count < 1:
        raise UserError(f"nothing says how many steps the optimizer took; {DROP}")
    return AdamState(count, _settings(optimizer), not steps)


def _counts(tree: Any, name: str) -> list[int]:
    """Whole numbers from 1 on under a key; PyTorch counts in floats."""
    numbers = [one for one in named(tree, name) if type(one) in (int, float)]
    return [int(one) for one in numbers if 1 <= one < MOST_STEPS]


def _settings(optimizer: Any) -> dict[str, Any]:
    """Those of the group with the largest weight decay; others are of norms and biases."""
    lists = [listed for listed in named(optimizer, "param_groups") if isinstance(listed, list)]
    groups = [one for listed in lists for one in listed if isinstance(one, dict)]
    decays = [_decay(one) for one in groups]
    if not groups:
        return {}
    chosen = groups[decays.index(max(decays))]
    return {name: chosen[name] for name in SETTINGS if chosen.get(name) is not None}


def _decay(group: Mapping[str, Any]) -> float:
    value = group.get("weight_decay")
    factor = group.get("wd_mult", 1.0)
    both = isinstance(value, int | float) and isinstance(factor, int | float)
    return float(value * factor) if both else 0.0
