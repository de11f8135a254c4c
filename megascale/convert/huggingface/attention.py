"""Rotary angles and attention of the layers: of a config.json as our options, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megascale.config import ModelConfig, RopeScalingConfig
from megascale.convert.huggingface.families import BY_LAYER, EVERY_LAYER, FAMILIES, Family
from megascale.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"
MOST_LAYERS = 10_000
"""As many layers are looked at; `config` refuses more."""
SCALINGS: dict[str, dict[str, str]] = {
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_turns",
        "high_freq_factor": "high_turns",
        "original_max_position_embeddings": "original_tokens",
    },
    "yarn": {
        "factor": "factor",
        "beta_slow": "low_turns",
        "beta_fast": "high_turns",
        "original_max_position_embeddings": "original_tokens",
        "attention_factor": "attention_factor",
        "truncate": "whole_pairs",
    },
    "linear": {"factor": "factor"},
}
"""By kind of rope scaling, their names of its options, and ours."""
NOT_READ = {"mscale": "attention_factor", "mscale_all_dim": "attention_factor"}
"""Options of YaRN that are refused, and what to give in their place."""


def attention_options(config: Any, family: Family, where: Path) -> dict[str, Any]:
    """Options of our model. Raises UserError, which `where` begins, for what it cannot be."""
    kinds = _kinds(config, family, where)
    slides = any(kind.startswith("sliding") for kind in kinds)
    rope = config.rope_parameters
    base, scaling = _angles(rope[FULL] if family.rope_by_kind else rope, family, where)
    local = None
    if family.rope_by_kind and slides:
        local = _local_base(rope, family, where)
    return {
        "rope_base": base,
        "rope_scaling": scaling,
        "local_rope_base": local,
        "sliding_window": config.sliding_window if slides else None,
        "attention_pattern": _pattern(kinds),
    }


def _local_base(rope: dict[str, Any], family: Family, where: Path) -> float | None:
    """The base of layers with a window; None where their angles are those of all layers."""
    base, scaling = _angles(rope[SLIDING], family, where)
    if (base, scaling) == _angles(rope[FULL], family, where):
        return None
    if scaling is not None:
        raise UserError(
            f"{where}: scaled rotary angles of sliding_attention alone are not built; only "
            "rope_type = default is"
        )
    return base


def _angles(
    rope: dict[str, Any], family: Family, where: Path
) -> tuple[float, RopeScalingConfig | None]:
    kind = rope.get("rope_type")
    # with angles that are not scaled, most families do not read the part of a head that is turned
    reads_part = kind != "default" or family.partial_rotary
    if reads_part and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor = {rope['partial_rotary_factor']} is not built; only "
            "1.0 is"
        )
    if kind not in ("default", *family.scalings):
        raise UserError(
            f"{where}: rotary embedding {rope} is not built; rope_type = "
            f"{', '.join(('default', *family.scalings))} are"
        )
    if not isinstance(rope.get("rope_theta"), int | float):
        raise UserError(f"{where}: rope_theta = {rope.get('rope_theta')} must be a number")
    for name, instead in NOT_READ.items():
        if rope.get(name):
            raise UserError(f"{where}: {name} = {rope[name]} is not built; give {instead}")
    return float(rope["rope_theta"]), _scaling(rope)


def _scaling(rope: dict[str, Any]) -> RopeScalingConfig | None:
    if rope["rope_type"] == "default":
        return None
    names = SCALINGS[rope["rope_type"]]
    given = {ours: rope[theirs] for theirs, ours in names.items() if rope.get(theirs) is not None}
    return RopeScalingConfig(kind=rope["rope_type"], **given)


def _kinds(config: Any, family: Family, where: Path) -> list[str]:
    """The kind of attention of each layer."""
    count = min(config.num_hidden_layers, MOST_LAYERS)
    windows = [False] * count
    if family.window == EVERY_LAYER:
        windows = [config.sliding_window is not None] * count
    elif family.window == BY_LAYER:
        windows = _windows(config, family, where)[:count]
    turned = [True] * count
    if family.nope:
        turned = [bool(one) for one in config.no_rope_layers[:count]]
    if not len(windows) == len(turned) == count:
        raise UserError(
            f"{where}: layer_types and no_rope_layers must have {count} values; correct the config"
        )
    return [
        ("sliding" if slides else "full") + ("" if turns else "_nope")
        for slides, turns in zip(windows, turned, strict=True)
    ]


def _windows(config: Any, family: Family, where: Path) -> list[bool]:
    layers = config.layer_types
    others = set(layers) - {FULL, SLIDING}
    if others:
        raise UserError(
            f"{where}: layers of {', '.join(sorted(others))} are not built; {FULL} and {SLIDING} "
            "are"
        )
    is_on = not family.window_switch or config.use_sliding_window
    if SLIDING in layers and not (config.sliding_window and is_on):
        raise UserError(
            f"{where}: layers of sliding_attention need sliding_window"
            f"{' and use_sliding_window = true' if family.window_switch else ''}; correct the "
            "config"
        )
    return [layer == SLIDING for layer in layers]


def _pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that gives `kinds`; none where `sliding_window` alone says it."""
    if set(kinds) in ({"full"}, {"sliding"}, set()):
        return ()
    for length in range(1, len(kinds) + 1):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    raise AssertionError("all of them are a pattern")


def options_of_attention(model: ModelConfig, kind: str) -> dict[str, Any]:
    """What config.json of the family `kind` says of the attention of a model that it has."""
    family = FAMILIES[kind]
    kinds = [model.attention_kind(layer) for layer in range(1, model.num_layers + 1)]
    rope = _rope(model.rope_base, model.rope_scaling)
    options: dict[str, Any] = {"rope_parameters": rope}
    if family.rope_by_kind:
        local = model.local_rope_base
        options["rope_parameters"] = {
            FULL: rope,
            SLIDING: rope if local is None else _rope(local, None),
        }
    if family.window is not None:
        options["sliding_window"] = model.sliding_window
    if family.window_switch:
        options["use_sliding_window"] = model.sliding_window is not None
    if family.window == BY_LAYER:
        options["layer_types"] = [SLIDING if one.startswith("sliding") else FULL for one in kinds]
    if family.window_switch and family.window == BY_LAYER and not family.nope:
        options["max_window_layers"] = 0
    if family.nope:
        options["no_rope_layers"] = [int(not one.endswith("_nope")) for one in kinds]
    return options


def _rope(base: float, scaling: RopeScalingConfig | None) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": base}
    if scaling is None:
        return rope
    values = {
        theirs: scaling.kept_turns if ours == "high_turns" else getattr(scaling, ours)
        for theirs, ours in SCALINGS[scaling.kind].items()
    }
    given = {name: value for name, value in values.items() if value is not None}
    return rope | {"rope_type": scaling.kind} | given
