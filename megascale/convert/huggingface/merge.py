"""config.json of a model that has come from an import: what was kept, and what has changed."""

from __future__ import annotations

from typing import Any

from megascale.config import ModelConfig
from megascale.convert.huggingface.config import (
    architecture_of,
    config_from,
    model_of,
    options_of,
    rope_for_all,
)
from megascale.convert.huggingface.documents import CONFIG
from megascale.convert.huggingface.families import family_of, kind_of
from megascale.convert.huggingface.kept import POSITIONS, Kept

ROPE = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
"""Options by which some version of transformers decides the rotary angles."""
EXPERTS = ("num_experts", "num_local_experts")
"""Two names of one option."""
LAYERED = ("layer_types", "no_rope_layers")
"""Options with a value for each layer."""
NOT_KEPT = ("auto_map", "torch_dtype")
"""Code of the imported folder, which is not run here; an old name of `dtype`."""


def merged_config(
    kept: Kept, model: ModelConfig, context_tokens: int, dtype: str
) -> dict[str, Any]:
    """config.json of what has become of an imported model: options that are as they were stay in
    the words of the import, the others are those of `model` (finalized).

    Raises UserError where no family has such a model.
    """
    was, where = kind_of(kept.config), kept.folder / CONFIG
    kind = family_of(model, preferred=was)
    positions = {POSITIONS: max(kept.config[POSITIONS], context_tokens)}
    # read with the new context, on which options may depend that the import did not state:
    # `original_max_position_embeddings` of scaled angles is the context unless it is stated
    old = options_of(model_of(config_from({**kept.config, **positions}, where), where), was)
    new = options_of(model, kind)
    document = {k: value for k, value in kept.config.items() if k not in NOT_KEPT}
    if kind != was:
        stale = {*old, *EXPERTS, *ROPE, *LAYERED, *_options_that_only(kind, was)}
        document = {k: value for k, value in document.items() if k not in stale}
        old = {}
    changed = {k: value for k, value in new.items() if k not in old or old[k] != value}
    if "rope_parameters" in changed:
        document = {k: value for k, value in document.items() if k not in ROPE}
        changed |= rope_for_all(changed["rope_parameters"])
    for name in LAYERED:
        if len(document.get(name) or ()) != model.num_layers:
            document.pop(name, None)
    return {
        **document,
        **changed,
        "model_type": kept.config["model_type"] if kind == was else kind,
        "architectures": [architecture_of(kind)],
        "dtype": dtype,
        **positions,
    }


def _options_that_only(kind: str, was: str) -> set[str]:
    """Options that the family `kind` has and `was` ignores: the import did not mean them."""
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING[kind]().to_dict()) - set(CONFIG_MAPPING[was]().to_dict())
