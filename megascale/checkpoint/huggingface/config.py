"""A config.json of Hugging Face as our ModelConfig, and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megascale.checkpoint.storage import one_line
from megascale.config import (
    DataConfig,
    ModelConfig,
    MoeConfig,
    RopeScalingConfig,
    RunConfig,
    SourceConfig,
    finalize,
)
from megascale.documents import read_json
from megascale.errors import UserError

CONFIG = "config.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": None,
}
"""Options of which our model knows one value."""
LEAST_MULTIPLE = 8
"""A vocabulary that this divides is not padded; up to 8 tensor ranks can share it."""


def read_config(folder: Path) -> Any:
    """The `transformers` config of a model folder, defaults filled in.

    Raises UserError where it cannot be read or is of a family that is not in `FAMILIES`.
    """
    from transformers import CONFIG_MAPPING

    path = folder / CONFIG
    try:
        document = read_json(path)
        kind = document.get("model_type")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give the folder of a Hugging Face model"
        ) from None
    except (UserError, AttributeError):
        raise UserError(f"{path} is not the JSON of a config; copy the model again") from None
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not built; {', '.join(FAMILIES)} are")
    try:
        return CONFIG_MAPPING[kind].from_dict(document)
    except Exception as error:  # its validation raises many kinds
        raise UserError(f"{path}: {one_line(error)}") from None


def model_of(config: Any, where: Path) -> ModelConfig:
    """Our model of the same shape; `where` begins errors.

    Raises UserError for what our model cannot be.
    """
    for name, wanted in ONLY.items():
        value = getattr(config, name, wanted)
        if value != wanted:
            raise UserError(f"{where}: {name} = {value} is not built; only {wanted} is")
    rope, vocabulary = config.rope_parameters, math.gcd(config.vocab_size, 128)
    known = rope["rope_type"] in ("default", "llama3")
    if not known or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: rotary embedding {rope} is not built; rope_type = default and llama3 are"
        )
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
        rope_base=float(rope["rope_theta"]),
        rope_scaling=_scaling(rope),
        norm_eps=config.rms_norm_eps,
        qk_norm=config.model_type in ("qwen3", "qwen3_moe"),
        qkv_bias=config.model_type == "qwen2" or getattr(config, "qkv_bias", False),
        sliding_window=_window(config, where),
        init_std=config.initializer_range,
        moe=_moe(config, where),
    )
    try:
        return complete(RunConfig(model=model)).model
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def complete(config: RunConfig) -> RunConfig:
    """A config that names no corpus, with everything derived. Raises UserError as finalize does."""
    data = DataConfig(
        sources={"none": SourceConfig(path="none")}, context_tokens=config.data.context_tokens
    )
    return finalize(RunConfig(model=config.model, data=data, train=config.train), {"none": 1}, 1)


SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_turns",
    "high_freq_factor": "high_turns",
    "original_max_position_embeddings": "original_tokens",
}
"""Their names of Llama 3's rope scaling, and ours."""


def _scaling(rope: dict[str, Any]) -> RopeScalingConfig | None:
    if rope["rope_type"] != "llama3":
        return None
    return RopeScalingConfig(**{ours: rope[theirs] for theirs, ours in SCALING.items()})


def _rope(model: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling is None:
        return rope
    scaling = {theirs: getattr(model.rope_scaling, ours) for theirs, ours in SCALING.items()}
    return rope | {"rope_type": "llama3"} | scaling


def _window(config: Any, where: Path) -> int | None:
    layers = set(getattr(config, "layer_types", None) or ())
    if len(layers) > 1 or layers - {"full_attention", "sliding_attention"}:
        kinds = ", ".join(sorted(layers))
        raise UserError(f"{where}: layers of {kinds} in one model are not built; equal layers are")
    if layers == {"full_attention"}:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _moe(config: Any, where: Path) -> MoeConfig | None:
    if config.model_type not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return None
    if config.num_experts_per_tok == 1:
        raise UserError(
            f"{where}: one expert per token, of weight 1, is not built; two or more are"
        )
    size = config.intermediate_size
    return MoeConfig(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        normalize_top_k=getattr(config, "norm_topk_prob", True),
        ffn_hidden_size=getattr(config, "moe_intermediate_size", size),
        shared_ffn_hidden_size=getattr(config, "shared_expert_intermediate_size", 0),
        shared_gate=config.model_type == "qwen2_moe",
    )


def family_of(model: ModelConfig) -> str:
    """The family whose models are of our model's kind. Raises UserError where there is none."""
    moe = model.moe
    lacking = {
        "model.parallel_block": model.parallel_block,
        "model.qkv_bias with model.qk_norm": model.qkv_bias and model.qk_norm,
        "model.qkv_bias with model.moe without model.moe.shared_gate": model.qkv_bias
        and moe is not None
        and not moe.shared_gate,
        "model.moe.shared_ffn_hidden_size without model.moe.shared_gate": moe is not None
        and moe.shared_ffn_hidden_size > 0
        and not moe.shared_gate,
        "model.moe.shared_gate with model.qk_norm": moe is not None
        and moe.shared_gate
        and model.qk_norm,
        "model.moe.attention_experts": moe is not None and moe.attention_experts > 1,
        "model.moe.normalize_top_k = false without model.qk_norm or model.moe.shared_gate": moe
        is not None
        and not (moe.normalize_top_k or moe.shared_gate or model.qk_norm),
        "model.moe.top_k = 1": moe is not None and moe.top_k == 1,
        "model.moe.balance = loss_free": moe is not None and moe.balance == "loss_free",
    }
    for option, is_set in lacking.items():
        if is_set:
            raise UserError(f"no family of Hugging Face has {option}; such a model stays here")
    if moe is not None:
        if moe.shared_gate:
            return "qwen2_moe"
        return "qwen3_moe" if model.qk_norm else "mixtral"
    if model.qk_norm or model.qkv_bias:
        return "qwen3" if model.qk_norm else "qwen2"
    # Llama's config wants heads that divide the width, and knows no window
    plain = model.sliding_window is None and model.hidden_size % model.num_heads == 0
    return "llama" if plain else "mistral"


def config_of(model: ModelConfig, context_tokens: int, dtype: str) -> Any:
    """The `transformers` config of our (finalized) model, with `dtype` such as float32.

    Raises UserError where no family has such a model.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, moe, inner = family_of(model), model.moe, model.ffn_hidden_size
    options: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind.startswith("qwen"):
        options |= {"use_sliding_window": model.sliding_window is not None, "max_window_layers": 0}
    if moe is not None:
        options |= {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
        if kind == "mixtral":
            inner = moe.ffn_hidden_size
        else:
            options |= {
                "moe_intermediate_size": moe.ffn_hidden_size,
                "norm_topk_prob": moe.normalize_top_k,
            }
        if kind == "qwen2_moe":
            options |= {
                "num_experts": moe.num_experts,
                "qkv_bias": model.qkv_bias,
                "shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
            }
    return CONFIG_MAPPING[kind](
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        dtype=dtype,
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=inner,
        vocab_size=model.vocab_size,
        tie_word_embeddings=model.tied_embeddings,
        rope_parameters=_rope(model),
        rms_norm_eps=model.norm_eps,
        sliding_window=model.sliding_window,
        max_position_embeddings=context_tokens,
        initializer_range=model.init_std,
        **options,
    )


def write_config(config: Any, folder: Path) -> None:
    """Write config.json, with the rotary angles where versions before 5 look for them.

    Raises OSError.
    """
    config.save_pretrained(folder)
    path = folder / CONFIG
    document = read_json(path)
    document["rope_theta"] = config.rope_parameters["rope_theta"]
    if config.rope_parameters["rope_type"] != "default":
        rope = config.rope_parameters.items()
        document["rope_scaling"] = {name: value for name, value in rope if name != "rope_theta"}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
