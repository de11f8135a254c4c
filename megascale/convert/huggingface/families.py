"""The families of Hugging Face models: what each has, and which one a model of ours belongs to."""

from __future__ import annotations

from dataclasses import dataclass

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
    qk_norm: bool = False
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
    "llama": Family(biases=("attention_bias", "mlp_bias")),
    "mistral": Family(window=EVERY_LAYER),
    "qwen2": Family(window=BY_LAYER, qkv_bias=True),
    "qwen3": Family(window=BY_LAYER, qk_norm=True, biases=("attention_bias",)),
    "mixtral": Family(
        window=EVERY_LAYER,
        has_experts=True,
        training_only=("attention_dropout", "router_jitter_noise"),
    ),
    "qwen2_moe": Family(window=BY_LAYER, qkv_bias=None, has_experts=True, is_qwen_moe=True),
    "qwen3_moe": Family(
        window=EVERY_LAYER,
        qk_norm=True,
        biases=("attention_bias",),
        has_experts=True,
        is_qwen_moe=True,
    ),
}


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
    if moe is not None:
        if moe.shared_gate:
            return "qwen2_moe"
        return "qwen3_moe" if model.qk_norm else "mixtral"
    if model.qk_norm or model.qkv_bias:
        return "qwen3" if model.qk_norm else "qwen2"
    # Llama's config wants heads that divide the width, and knows no window
    plain = model.sliding_window is None and model.hidden_size % model.num_heads == 0
    return "llama" if plain and preferred != "mistral" else "mistral"
