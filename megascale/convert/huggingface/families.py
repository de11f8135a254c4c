"""The families of Hugging Face models: what each has, and which one a model of ours belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megascale.config import ModelConfig
from megascale.errors import UserError

EVERY_LAYER, BY_LAYER = "every layer", "by layer"


@dataclass(frozen=True)
class Family:
    """What sets the models of a family apart: the options that `transformers` 5 reads for them.

    An option that a family does not have is ignored there, whatever a config.json says of it.
    Source: the modeling files of transformers.
    """

    window: str | None = None
    """Which layers `sliding_window` is for: all of them, or those that `layer_types` names."""
    window_switch: bool = False
    """It has `use_sliding_window`."""
    nope: bool = False
    """`no_rope_layers` names layers without rotary embedding."""
    scalings: tuple[str, ...] = ("llama3", "yarn", "linear")
    """Kinds of rope scaling."""
    partial_rotary: bool = False
    """It reads `partial_rotary_factor`, of which our model has only 1."""
    has_head_dim: bool = True
    """The size of a head is an option. If not, the heads divide the width."""
    fused: bool = False
    """Queries, keys and values are one tensor, and so are gate and up."""
    example: str = ""
    """A model of the family that people know."""
    qk_norm: bool = False
    norms_after: bool = False
    """Norms are after attention and feed-forward part, and qk-norm is over all heads."""
    rope_by_kind: bool = False
    """Layers with a window have rotary angles of their own."""
    qkv_bias: bool | None = False
    """None: an option of that name decides."""
    biases: tuple[str, ...] = ()
    """Options that add biases which our model lacks."""
    has_experts: bool = False
    is_qwen_moe: bool = False
    """Experts have a size of their own, some layers may be dense, and whether weights are
    normalized is an option."""
    training_only: tuple[str, ...] = ("attention_dropout",)
    """Options that change nothing but training."""


FAMILIES = {
    "llama": Family(
        biases=("attention_bias", "mlp_bias"), has_head_dim=False, example="Llama 3.1, SmolLM2"
    ),
    "mistral": Family(window=EVERY_LAYER, example="Mistral 7B"),
    "ministral": Family(window=BY_LAYER, example="Ministral 8B"),
    "smollm3": Family(
        window=BY_LAYER,
        window_switch=True,
        nope=True,
        biases=("attention_bias", "mlp_bias"),
        has_head_dim=False,
        example="SmolLM3",
    ),
    "phi3": Family(
        window=EVERY_LAYER,
        scalings=(),
        partial_rotary=True,
        has_head_dim=False,
        fused=True,
        training_only=("attention_dropout", "resid_pdrop", "embd_pdrop"),
        example="Phi-3-mini-4k, Phi-4",
    ),
    "qwen2": Family(window=BY_LAYER, window_switch=True, qkv_bias=True, example="Qwen2.5"),
    "qwen3": Family(
        window=BY_LAYER,
        window_switch=True,
        qk_norm=True,
        biases=("attention_bias",),
        example="Qwen3",
    ),
    "olmo2": Family(
        qk_norm=True,
        norms_after=True,
        biases=("attention_bias",),
        has_head_dim=False,
        example="OLMo 2",
    ),
    "olmo3": Family(
        window=BY_LAYER,
        qk_norm=True,
        norms_after=True,
        rope_by_kind=True,
        biases=("attention_bias",),
        has_head_dim=False,
        example="OLMo 3",
    ),
    "mixtral": Family(
        window=EVERY_LAYER,
        has_experts=True,
        training_only=("attention_dropout", "router_jitter_noise"),
        example="Mixtral 8x7B",
    ),
    "qwen2_moe": Family(
        window=BY_LAYER,
        window_switch=True,
        qkv_bias=None,
        has_experts=True,
        is_qwen_moe=True,
        example="Qwen1.5-MoE, Qwen2-57B-A14B",
    ),
    "qwen3_moe": Family(
        window=EVERY_LAYER,
        window_switch=True,
        qk_norm=True,
        biases=("attention_bias",),
        has_experts=True,
        is_qwen_moe=True,
        example="Qwen3-30B-A3B",
    ),
}
"""By model_type; a model that several families have is exported as the first of them."""
NOT_BUILT = {
    "MLA": ("deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash", "kimi_k2"),
    "linear attention": ("qwen3_next", "minimax", "kimi_linear", "rwkv", "qwen3_5"),
    "state spaces": ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "nemotron_h"),
    "attention sinks": ("gpt_oss",),
    "GeGLU": ("gemma", "gemma2", "gemma3_text", "gemma3"),
}
"""What models of other families need that is not built here, and their model_type."""


def kind_of(document: Mapping[str, Any]) -> Any:
    """The family that `transformers` takes the model of a config.json for."""
    kind = document.get("model_type")
    return "ministral" if kind == "mistral" and "layer_types" in document else kind


def not_built(kind: Any) -> str:
    """Why models of a family are refused."""
    needed = next((what for what, kinds in NOT_BUILT.items() if kind in kinds), None)
    reason = f" ({needed} is not built)" if needed else ""
    return f"model_type {kind!r} is not built{reason}; {', '.join(FAMILIES)} are"


def family_of(model: ModelConfig, preferred: str | None = None) -> str:
    """The family whose models are of our model's kind; `preferred` where several are.

    Raises UserError where there is none.
    """
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
        "model.moe.top_k = 1 without model.qk_norm or model.moe.shared_gate": moe is not None
        and moe.top_k == 1
        and not (moe.shared_gate or model.qk_norm),
        "model.moe.balance = loss_free": moe is not None and moe.balance == "loss_free",
    }
    for option, is_set in lacking.items():
        if is_set:
            raise UserError(f"no family of Hugging Face has {option}; such a model stays here")
    fitting = [kind for kind in FAMILIES if _has(kind, model)]
    if not fitting:
        raise UserError(
            "no family of Hugging Face has model.attention_pattern, model.rope_scaling and "
            "model.sliding_window as they are here with the rest of this model; it stays here"
        )
    return preferred if preferred in fitting else fitting[0]


def _has(kind: str, model: ModelConfig) -> bool:
    """Whether the models of a family have what sets this one apart."""
    family, moe, heads = FAMILIES[kind], model.moe, model.num_heads
    kinds = {model.attention_kind(layer) for layer in range(1, model.num_layers + 1)}
    windows = {one.startswith("sliding") for one in kinds}
    whole_heads = model.hidden_size % heads == 0
    if kind != "llama":  # its config has a size of heads, and wants heads that divide the width
        whole_heads = family.has_head_dim or model.head_dim == model.hidden_size // heads
    return (
        (moe is not None) == family.has_experts
        and (moe is not None and moe.shared_gate) == (kind == "qwen2_moe")
        and family.qkv_bias in (None, model.qkv_bias)
        and family.qk_norm == model.qk_norm
        and (model.rope_scaling is None or model.rope_scaling.kind in family.scalings)
        and (family.rope_by_kind or model.local_rope_base is None)
        and family.norms_after == (model.norm_position == "after")
        and (family.norms_after and model.qk_norm) == (model.qk_norm_heads == "all")
        and (family.nope or not any(one.endswith("_nope") for one in kinds))
        and (family.window is not None or windows == {False})
        and (family.window == BY_LAYER or len(windows) == 1)
        and whole_heads
    )
