"""What may change between the run that wrote a checkpoint and the run that continues it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megascale.checkpoint.folder import checkpoints_dir
from megascale.checkpoint.load import Found
from megascale.config import RunConfig, dump_config, parse_config
from megascale.config.lr_curves import OPTIONS, options_of
from megascale.errors import UserError
from megascale.optim.schedule import lr_at
from megascale.parsing import parse_yaml

ORDER_OF_DATA = ("seed", "data.context_tokens", "data.global_batch_tokens", "data.batch_ramp")
WEIGHTS_AND_START = ("model", "start")
CHANGEABLE = (
    *("implementation", "vocab_multiple", "moe.balance_weight", "moe.balance_weights"),
    *("moe.micro_share", "moe.estimate", "moe.bias_rate", "moe.z_loss_coeff"),
)
"""Of the model's options, those that change no weight and no function."""


def compare_configs(saved_yaml: str, config: RunConfig, tokens_seen: int) -> list[str]:
    """Lines `key: old -> new` for what changed since the checkpoint, after `tokens_seen`.

    Raises UserError for a change that would silently continue another run: of the model's
    shape, of where the run started, or of what decides the order of the data.
    """
    saved = parse_config(saved_yaml)
    changed = changes(*_trees(saved, config))
    for key, (was, now) in changed.items():
        fixed = key.startswith(ORDER_OF_DATA) or key.split(".")[0] in WEIGHTS_AND_START
        fixed = fixed and not (key == "start.checkpoint" and same_start(saved, config))
        if fixed and key.removeprefix("model.") not in CHANGEABLE:
            raise UserError(
                f"{key} was {was} when the checkpoint was written and is "
                f"{now} now; set it back, or branch off into a new run_dir with start.checkpoint"
            )
    lines = [
        f"{key}: {json.dumps(was)} -> {json.dumps(now)}" for key, (was, now) in changed.items()
    ]
    rates = [lr_at(tokens_seen, one.optim.schedule) for one in (saved, config)]
    if rates[0] != rates[1]:
        lines.append(f"learning rate at {tokens_seen:,} tokens: {rates[0]:.4g} -> {rates[1]:.4g}")
    return lines


def _trees(*configs: RunConfig) -> list[dict[str, Any]]:
    """Finalized configs as nested mappings, with curves by name where all of them have names."""
    trees = [parse_yaml(dump_config(config), "config") for config in configs]
    named = [options_of(config.optim.schedule) for config in configs]
    if all(named):
        for tree, optim in zip(trees, named, strict=True):
            tree["optim"] |= {name: getattr(optim, name) for name in ("curve", *OPTIONS)}
            del tree["optim"]["schedule"]
    return trees


def same_start(was: RunConfig, now: RunConfig) -> bool:
    """Whether both start alike: from one checkpoint, or `now` from the run that it belongs to, or
    each from what its own small model became, wherever their folders were moved."""
    beside = [_starts_beside(one) for one in (was, now)]
    checkpoint = was.start.checkpoint
    is_of_run = checkpoints_dir(now.start.checkpoint or "") == Path(checkpoint or "").parent
    if all(beside) or is_of_run:
        checkpoint = now.start.checkpoint
    return replace(was.start, checkpoint=checkpoint) == now.start


def _starts_beside(config: RunConfig) -> bool:
    start = Path(config.start.checkpoint or "")
    return start.parts[-2:] == (f"{Path(config.run_dir).name}-base", "grown")


def changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted names of what differs between two trees, each with old and new value.

    Mappings in lists are told apart by their place, as in `data.stages[1].tokens`.
    """
    was, now = _flatten(old), _flatten(new)
    return {
        key: (was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)
    }


def compare_sources(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError where a source that has been read is not the same data any more."""
    for name, was in saved.items():
        if name not in now:
            raise UserError(f"data.sources lacks '{name}', which the checkpoint has read from")
        if was != now[name]:
            raise UserError(
                f"source '{name}' held {was} when the checkpoint was written and holds "
                f"{now[name]} now; bring the old data (or data.sources.{name}) back, or "
                "start in a new run_dir"
            )


def softmax_changes(found: Found, config: RunConfig) -> list[str]:
    """A line where a checkpoint was trained by a version that counted padded rows of the
    vocabulary in the softmax: such versions saved these rows.

    Raises UserError where the checkpoint's index is refused.
    """
    from megascale.checkpoint.storage import read_index
    from megascale.model.vocabulary import VOCABULARY

    stored, known = read_index(found.folder).tensors[VOCABULARY[0]], config.model.vocab_size or 0
    padded = stored.size[0] - known
    if padded <= 0 or not found.manifest.position.step:
        return []
    return [
        f"the loss will change: {found.folder} was trained with {padded} padded rows of the "
        "vocabulary in the softmax, and these now have probability 0, so losses are lower"
    ]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        parts = {f"{prefix}.{key}" if prefix else key: value for key, value in tree.items()}
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        parts = {f"{prefix}[{index}]": item for index, item in enumerate(tree)}
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        flat |= _flatten(value, name)
    return flat
