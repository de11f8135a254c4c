"""Our model with the architecture of a Megatron checkpoint."""

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


def model_of(options: Description, names: Names, vocab_size: int) -> ModelConfig:
    """The complete model. Missing options are read from the tensors where these show them.

    Raises UserError, naming an option, for a model that is not built.
    """
    options.refuse_others()
    try:
        model = checked(_model_of(options, names, vocab_size), "model")
        return complete(RunConfig(model=model)).model
    except UserError as error:
        place = "" if str(error).startswith(options.where) else f"{options.where}: "
        raise UserError(f"{place}{error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{options.where}: a value of the wrong type: {one_line(error)}") from None


def _model_of(options: Description, names: Names, vocab_size: int) -> ModelConfig:
    layers, heads = options.number("num_layers"), options.number("num_attention_heads")
    hidden = options.number("hidden_size")
    moe = _moe(options, names)
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_groups(options, heads),
        head_dim=options.number("kv_channels") if options.has("kv_channels") else None,
        ffn_hidden_size=_inner(options, names, moe),
        vocab_size=vocab_size,
        vocab_multiple=_multiple(vocab_size, names.rows),
        tied_embeddings=_tied(options, names),
        rope_base=float(options.get("rotary_base", default=ROPE_BASE)),
        rope_scaling=_scaling(options),
        norm_eps=float(options.get("norm_epsilon", "layernorm_epsilon", default=NORM_EPS)),
        qk_norm=bool(_or_seen(options, names, "qk_layernorm", "self_attention.q_layernorm.weight")),
        qkv_bias=bool(_or_seen(options, names, "add_qkv_bias", "self_attention.linear_qkv.bias")),
        sliding_window=_window(options),
        init_std=float(options.get("init_method_std", default=INIT_STD)),
        moe=moe,
    )


def _or_seen(options: Description, names: Names, option: str, tensor: str) -> Any:
    """An option; where it is missing, whether layers have the tensor that it adds."""
    return options.get(option) if options.has(option) else names.in_layers(tensor)


def _groups(options: Description, heads: int) -> int:
    """Megatron-LM has an option that switches groups off, whatever their number."""
    if options.values.get("group_query_attention") is False or not options.has("num_query_groups"):
        return heads
    return options.number("num_query_groups")


def _tied(options: Description, names: Names) -> bool:
    if options.has("share_embeddings_and_output_weights"):
        return bool(options.get("share_embeddings_and_output_weights"))
    if options.has("untie_embeddings_and_output_weights"):
        return not options.get("untie_embeddings_and_output_weights")
    return "output_layer.weight" not in names.shapes


def _inner(options: Description, names: Names, moe: MoeConfig | None) -> int | None:
    if options.has("ffn_hidden_size"):
        return options.number("ffn_hidden_size")
    return moe.ffn_hidden_size if moe is not None else names.last_dim("mlp.linear_fc2.weight")


def _multiple(vocab_size: int, rows: int) -> int:
    """A multiple with which our padding has as many rows as Megatron's."""
    fitting = (m for m in VOCAB_MULTIPLES if -(-vocab_size // m) * m == rows)
    return next(fitting, rows)


def _scaling(options: Description) -> RopeScalingConfig | None:
    """Megatron has Llama 3's scaling, with all of its numbers fixed but the factor."""
    if not (options.values.get("use_rope_scaling") or options.values.get("rope_scaling")):
        return None
    factor = float(options.get("rope_scaling_factor", default=8.0))
    return RopeScalingConfig(factor=factor, low_turns=1.0, high_turns=4.0, original_tokens=8192)


def _window(options: Description) -> int | None:
    """Megatron counts the tokens to the left of a query, and we count the query too."""
    window = options.values.get("window_size")
    if window is None:
        return None
    left, right = window if isinstance(window, list | tuple) else (window, 0)
    if left == -1:
        return None
    if right not in (0, -1):
        raise UserError(f"window_size = {window} is not built; only (N, 0) is")
    return int(left) + 1


def _moe(options: Description, names: Names) -> MoeConfig | None:
    experts = options.values.get("num_moe_experts") or options.values.get("num_experts")
    if not experts and not names.in_layers("mlp.router.weight"):
        return None
    frequency = options.values.get("moe_layer_freq", 1)
    every = frequency if isinstance(frequency, list | tuple) else [frequency]
    if any(one not in (1, "1") for one in every):
        raise UserError(
            f"moe_layer_freq = {str(frequency)[:60]} is not built; experts in every layer are"
        )
    top_k = options.number("moe_router_topk", default=2)
    first = bool(options.get("moe_router_pre_softmax", default=False))
    if top_k == 1 and not first:
        raise UserError(
            "moe_router_topk = 1 without moe_router_pre_softmax (an expert of weight 1) is not "
            "built; with it, or with two experts or more, it is"
        )
    inner = options.number("moe_ffn_hidden_size") if options.has("moe_ffn_hidden_size") else None
    return MoeConfig(
        num_experts=options.number("num_moe_experts", "num_experts"),
        top_k=top_k,
        normalize_top_k=not first,
        ffn_hidden_size=inner or options.number("ffn_hidden_size"),
        shared_ffn_hidden_size=options.values.get("moe_shared_expert_intermediate_size") or 0,
        shared_gate=bool(
            _or_seen(options, names, "moe_shared_expert_gate", "mlp.shared_experts.gate_weight")
        ),
    )
