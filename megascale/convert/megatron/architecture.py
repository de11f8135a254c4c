"""Our model of the shape that a Megatron checkpoint has."""

from __future__ import annotations

from typing import Any

from megascale.checkpoint.storage import one_line
from megascale.config import ModelConfig, MoeConfig, RopeScalingConfig, RunConfig
from megascale.config.complete import complete
from megascale.config.load import checked
from megascale.convert.megatron.description import Description
from megascale.convert.megatron.names import Names
from megascale.errors import UserError

ROPE_BASE, NORM_EPS, INIT_STD = 10_000.0, 1e-5, 0.02
"""Megatron's own defaults."""
VOCAB_MULTIPLES = (128, 64, 32, 16, 8)


def model_of(said: Description, names: Names, vocab_size: int) -> ModelConfig:
    """The complete model; what the options do not say is read from the tensors, where it shows.

    Raises UserError, naming an option, for what our model cannot be.
    """
    said.refuse_others()
    try:
        model = checked(_model_of(said, names, vocab_size), "model")
        return complete(RunConfig(model=model)).model
    except UserError as error:
        place = "" if str(error).startswith(said.where) else f"{said.where}: "
        raise UserError(f"{place}{error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{said.where}: a value of the wrong type: {one_line(error)}") from None


def _model_of(said: Description, names: Names, vocab_size: int) -> ModelConfig:
    layers, heads = said.number("num_layers"), said.number("num_attention_heads")
    hidden = said.number("hidden_size")
    moe = _moe(said, names)
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_groups(said, heads),
        head_dim=said.number("kv_channels") if said.has("kv_channels") else None,
        ffn_hidden_size=_inner(said, names, moe),
        vocab_size=vocab_size,
        vocab_multiple=_multiple(vocab_size, names.rows),
        tied_embeddings=_tied(said, names),
        rope_base=float(said.get("rotary_base", default=ROPE_BASE)),
        rope_scaling=_scaling(said),
        norm_eps=float(said.get("norm_epsilon", "layernorm_epsilon", default=NORM_EPS)),
        qk_norm=bool(_or_seen(said, names, "qk_layernorm", "self_attention.q_layernorm.weight")),
        qkv_bias=bool(_or_seen(said, names, "add_qkv_bias", "self_attention.linear_qkv.bias")),
        sliding_window=_window(said),
        init_std=float(said.get("init_method_std", default=INIT_STD)),
        moe=moe,
    )


def _or_seen(said: Description, names: Names, option: str, tensor: str) -> Any:
    """An option, or whether layers have a tensor that it adds."""
    return said.get(option) if said.has(option) else names.in_layers(tensor)


def _groups(said: Description, heads: int) -> int:
    """Megatron-LM has an option that says whether the number of groups counts."""
    if said.values.get("group_query_attention") is False or not said.has("num_query_groups"):
        return heads
    groups: int = said.number("num_query_groups")
    return groups


def _tied(said: Description, names: Names) -> bool:
    if said.has("share_embeddings_and_output_weights"):
        return bool(said.get("share_embeddings_and_output_weights"))
    if said.has("untie_embeddings_and_output_weights"):
        return not said.get("untie_embeddings_and_output_weights")
    return "output_layer.weight" not in names.shapes


def _inner(said: Description, names: Names, moe: MoeConfig | None) -> int | None:
    if said.has("ffn_hidden_size"):
        inner: int = said.number("ffn_hidden_size")
        return inner
    return moe.ffn_hidden_size if moe is not None else names.last_dim("mlp.linear_fc2.weight")


def _multiple(vocab_size: int, rows: int) -> int:
    """A multiple of which our padding has as many rows as Megatron's."""
    fits = (one for one in VOCAB_MULTIPLES if -(-vocab_size // one) * one == rows)
    return next(fits, rows)


def _scaling(said: Description) -> RopeScalingConfig | None:
    """Megatron has Llama 3's scaling, with all of its numbers fixed but the factor."""
    if not (said.values.get("use_rope_scaling") or said.values.get("rope_scaling")):
        return None
    factor = float(said.get("rope_scaling_factor", default=8.0))
    return RopeScalingConfig(factor=factor, low_turns=1.0, high_turns=4.0, original_tokens=8192)


def _window(said: Description) -> int | None:
    """Megatron counts the tokens to the left of a query, and we count the query too."""
    window = said.values.get("window_size")
    if window is None:
        return None
    left, right = window if isinstance(window, list | tuple) else (window, 0)
    if left == -1:
        return None
    if right not in (0, -1):
        raise UserError(f"window_size = {window} is not built; only (N, 0) is")
    return int(left) + 1


def _moe(said: Description, names: Names) -> MoeConfig | None:
    experts = said.values.get("num_moe_experts") or said.values.get("num_experts")
    if not experts and not names.in_layers("mlp.router.weight"):
        return None
    frequency = said.values.get("moe_layer_freq", 1)
    every = frequency if isinstance(frequency, list | tuple) else [frequency]
    if any(one not in (1, "1") for one in every):
        raise UserError(
            f"moe_layer_freq = {str(frequency)[:60]} is not built; experts in every layer are"
        )
    top_k = said.number("moe_router_topk", default=2)
    first = bool(said.get("moe_router_pre_softmax", default=False))
    if top_k == 1 and not first:
        raise UserError(
            "moe_router_topk = 1 without moe_router_pre_softmax (an expert of weight 1) is not "
            "built; with it, or with two experts or more, it is"
        )
    inner = said.number("moe_ffn_hidden_size") if said.has("moe_ffn_hidden_size") else None
    return MoeConfig(
        num_experts=said.number("num_moe_experts", "num_experts"),
        top_k=top_k,
        normalize_top_k=not first,
        ffn_hidden_size=inner or said.number("ffn_hidden_size"),
        shared_ffn_hidden_size=said.values.get("moe_shared_expert_intermediate_size") or 0,
        shared_gate=bool(
            _or_seen(said, names, "moe_shared_expert_gate", "mlp.shared_experts.gate_weight")
        ),
    )
