"""A config.json of Hugging Face as our ModelConfig, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from megascale.checkpoint.storage import one_line
from megascale.config import (
    ModelConfig,
    MoeConfig,
    RunConfig,
)
from megascale.config.complete import complete
from megascale.config.load import checked
from megascale.convert.huggingface.attention import (
    MOST_LAYERS,
    attention_options,
    options_of_attention,
)
from megascale.convert.huggingface.documents import CONFIG, read_document, write_document
from megascale.convert.huggingface.families import (
    FAMILIES,
    Family,
    family_of,
    kind_of,
    not_built,
)
from megascale.errors import UserError

ONLY = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "quantization_config": (None,),
}
"""Options that all families have, and the values that our model can be."""
LEAST_MULTIPLE = 8
"""A vocabulary that this divides is not padded; up to 8 tensor ranks can share it."""


def read_config(folder: Path) -> Any:
    """The `transformers` config of a model folder, defaults filled in.

    Raises UserError where it cannot be read or is of a family that is not in `FAMILIES`.
    """
    path = folder / CONFIG
    return config_from(read_document(path), path)


def config_from(document: Mapping[str, Any], path: Path) -> Any:
    """The `transformers` config of what a config.json says, which is left as it is.

    Raises UserError, which `path` begins, where it is refused.
    """
    from transformers import CONFIG_MAPPING

    kind = kind_of(document)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{path}: {not_built(kind)}")
    if document.get("per_layer_config"):
        raise UserError(f"{path}: per_layer_config is not built; equal layers are")
    try:
        config = CONFIG_MAPPING[kind].from_dict({**deepcopy(dict(document)), "model_type": kind})
        config.standardize_rope_params()  # a model with scaled angles does so too when it is made
        return config
    except Exception as error:  # its validation raises many kinds
        raise UserError(f"{path}: {one_line(error)}") from None


def model_of(config: Any, where: Path) -> ModelConfig:
    """Our model of the same shape; `where` begins errors.

    Raises UserError for what our model cannot be.
    """
    try:
        return _model_of(config, where)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: a value of the wrong type: {one_line(error)}") from None


def _model_of(config: Any, where: Path) -> ModelConfig:
    family = FAMILIES[config.model_type]
    _refuse(config, family, where)
    vocabulary = math.gcd(config.vocab_size, 128)
    model = ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        vocab_multiple=vocabulary if vocabulary >= LEAST_MULTIPLE else 128,
        tied_embeddings=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
        qk_norm=family.qk_norm,
        qk_norm_heads="all" if family.norms_after else "each",
        norm_position="after" if family.norms_after else "before",
        qkv_bias=config.qkv_bias if family.qkv_bias is None else family.qkv_bias,
        init_std=config.initializer_range,
        moe=_moe(config, family, where),
        **attention_options(config, family, where),
    )
    try:
        return complete(RunConfig(model=checked(model, "model"))).model
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def import_notes(config: Any) -> Iterator[str]:
    """What `transformers` can do with such a model, and what is not done here."""
    for name in FAMILIES[config.model_type].training_only:
        if value := getattr(config, name):
            yield f"{name} = {value} is not applied in training here; an export keeps it"
    if getattr(config, "auto_map", None):
        yield (
            "auto_map names code of the model folder, which is not run: the model is read as "
            f"a {config.model_type} of transformers, and an export leaves auto_map out"
        )


def _refuse(config: Any, family: Family, where: Path) -> None:
    """Raise UserError for options that the family has and that our model does not."""
    wanted = ONLY | {name: (False,) for name in family.biases}
    for name, values in wanted.items():
        value = getattr(config, name, values[0])
        if value not in values:
            raise UserError(f"{where}: {name} = {value} is not built; only {values[0]} is")


def _moe(config: Any, family: Family, where: Path) -> MoeConfig | None:
    if not family.has_experts:
        return None
    top_k, normalizes = config.num_experts_per_tok, True
    if family.is_qwen_moe:
        _refuse_dense_layers(config, where)
        normalizes = config.norm_topk_prob
    if top_k == 1 and normalizes:
        raise UserError(
            f"{where}: one expert per token, of weight 1, is not built; two or more are"
        )
    has_shared = config.model_type == "qwen2_moe"
    return MoeConfig(
        num_experts=config.num_experts,
        top_k=top_k,
        normalize_top_k=normalizes,
        ffn_hidden_size=(
            config.moe_intermediate_size if family.is_qwen_moe else config.intermediate_size
        ),
        shared_ffn_hidden_size=config.shared_expert_intermediate_size if has_shared else 0,
        shared_gate=has_shared,
    )


def _refuse_dense_layers(config: Any, where: Path) -> None:
    """Raise UserError where some layers have no experts."""
    every, listed = config.decoder_sparse_step, config.mlp_only_layers
    if every < 1:
        raise UserError(f"{where}: decoder_sparse_step = {every} must be at least 1")
    layers = range(min(config.num_hidden_layers, MOST_LAYERS))
    dense = [i for i in layers if i in listed or (i + 1) % every]
    if dense:
        raise UserError(
            f"{where}: mlp_only_layers = {listed} and decoder_sparse_step = {every} leave layers "
            f"{dense} without experts; experts in every layer are built"
        )


def options_of(model: ModelConfig, kind: str) -> dict[str, Any]:
    """What config.json of the family `kind` says of a (finalized) model that the family has."""
    family, moe = FAMILIES[kind], model.moe
    inner = model.ffn_hidden_size
    options = options_of_attention(model, kind)
    if family.has_head_dim or kind == "llama":
        options["head_dim"] = model.head_dim
    if moe is not None:
        inner = inner if family.is_qwen_moe else moe.ffn_hidden_size
        options |= _options_of_experts(moe, kind)
    if kind == "qwen2_moe":
        options["qkv_bias"] = model.qkv_bias
    return options | {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": inner,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
    }


def _options_of_experts(moe: MoeConfig, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"num_experts_per_tok": moe.top_k}
    if not FAMILIES[kind].is_qwen_moe:
        return options | {"num_local_experts": moe.num_experts}
    options |= {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.ffn_hidden_size,
        # one expert alone is weighted by its probability
        "norm_topk_prob": moe.normalize_top_k and moe.top_k > 1,
    }
    if moe.shared_gate:
        options["shared_expert_intermediate_size"] = moe.shared_ffn_hidden_size
    return options


def config_of(model: ModelConfig, context_tokens: int, dtype: str) -> Any:
    """The `transformers` config of our (finalized) model, with `dtype` such as float32.

    Raises UserError where no family has such a model.
    """
    from transformers import CONFIG_MAPPING

    kind = family_of(model)
    family: Any = CONFIG_MAPPING[kind]  # its options are those of the family
    return family(
        architectures=[architecture_of(kind)],
        dtype=dtype,
        max_position_embeddings=context_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options_of(model, kind),
    )


def architecture_of(kind: str) -> str:
    """The class of `transformers` that is a family's language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def rope_for_all(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary angles under the names of all versions of transformers; those by kind of layer have
    one name."""
    if "rope_theta" not in rope:
        return {"rope_parameters": rope}
    options: dict[str, Any] = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        options["rope_scaling"] = {k: value for k, value in rope.items() if k != "rope_theta"}
    return options


def write_config(config: Any, folder: Path) -> None:
    """Write config.json, with the rotary angles where versions before 5 look for them.

    Raises OSError.
    """
    config.save_pretrained(folder)
    path = folder / CONFIG
    write_document(read_document(path) | rope_for_all(config.rope_parameters), path)
