"""What Megatron saves beside the tensors of a checkpoint: arguments, progress, parameter groups."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from megascale.config import ModelConfig, OptimConfig, RunConfig
from megascale.convert.megatron.optimizer import RESHARDABLE
from megascale.errors import UserError
from megascale.model.counts import padded_vocab_size

LLAMA_SCALING = {"kind": "llama3", "low_turns": 1.0, "kept_turns": 4.0, "original_tokens": 8192}
"""Numbers of Llama 3's rope scaling that Megatron has no options for."""
CONTENT = {
    "distrib_optim_sharding_type": RESHARDABLE,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""How names and optimizer state of the checkpoint are made; Megatron-LM loads by it."""


def refuse_unknown(model: ModelConfig) -> None:
    """Raise UserError, naming an option, for a model that megatron-core's GPT does not have."""
    moe, scaling = model.moe, model.rope_scaling
    lacking = {
        "model.parallel_block": model.parallel_block,
        "model.norm_position = after": model.norm_position == "after",
        "model.qk_norm_heads = all": model.qk_norm_heads == "all",
        "model.attention_pattern": bool(model.attention_pattern),
        "model.local_rope_base": model.local_rope_base is not None,
        "model.moe.attention_experts": moe is not None and moe.attention_experts > 1,
        "model.moe.balance = loss_free": moe is not None and moe.balance == "loss_free",
        "model.rope_scaling other than Llama 3.1's": scaling is not None
        and any(getattr(scaling, name) != value for name, value in LLAMA_SCALING.items()),
    }
    for option, is_set in lacking.items():
        if is_set:
            raise UserError(f"Megatron's GPT has no {option}; such a model stays here")


def arguments_of(model: ModelConfig, context_tokens: int, has_optimizer: bool) -> Namespace:
    """The options of Megatron-LM's command line that describe a complete model."""
    moe, window = model.moe, model.sliding_window
    options: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "group_query_attention": model.num_kv_heads != model.num_heads,
        "kv_channels": model.head_dim,
        "seq_length": context_tokens,
        "max_position_embeddings": context_tokens,
        "padded_vocab_size": padded_vocab_size(model),
        "make_vocab_size_divisible_by": model.vocab_multiple,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "add_position_embedding": True,
        "position_embedding_type": "rope",
        "rotary_base": model.rope_base,
        "rotary_percent": 1.0,
        "use_rope_scaling": model.rope_scaling is not None,
        "window_size": None if window is None else (window - 1, 0),
        "init_method_std": model.init_std,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": None,
        "no_save_rng": True,
        "no_save_optim": not has_optimizer,
    }
    if model.rope_scaling is not None:
        options["rope_scaling_factor"] = model.rope_scaling.factor
    if moe is not None:
        options |= {
            "num_experts": moe.num_experts,
            "moe_router_topk": moe.top_k,
            "moe_router_pre_softmax": moe.top_k == 1 or not moe.normalize_top_k,
            "moe_ffn_hidden_size": moe.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
            "moe_shared_expert_gate": moe.shared_gate,
            "moe_layer_freq": 1,
            "moe_router_dtype": "fp32",
        }
    return Namespace(**options)


def common_state(
    config: RunConfig, progress: tuple[int, int], adam: Mapping[str, Any] | None, experts_cut: bool
) -> dict[str, Any]:
    """The content of `common.pt`; `progress` is iteration and tokens.

    `adam`: step and learning rate of the optimizer's state, None without it. `experts_cut`: the
    loading run spreads experts over ranks, and so it has a second optimizer for them.
    """
    iteration, tokens = progress
    context = config.data.context_tokens
    arguments = arguments_of(config.model, context, adam is not None)
    arguments.iteration = iteration
    arguments.consumed_train_samples = tokens // context
    state: dict[str, Any] = {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "content_metadata": dict(CONTENT),
    }
    if adam is not None:
        parts = list(_optimizers(config.optim, adam, experts_cut))
        state["optimizer"] = parts[0] if len(parts) == 1 else dict(enumerate(parts))
        state["opt_param_scheduler"] = _scheduler(config.optim, adam, tokens // context)
    return state


def _optimizers(
    optim: OptimConfig, adam: Mapping[str, Any], experts_cut: bool
) -> Iterator[dict[str, Any]]:
    """megatron-core's optimizers: of all weights, or of those outside experts and of experts."""
    yield _optimizer(_group(optim, adam, decays, False) for decays in (True, False))
    if experts_cut:
        yield _optimizer([_group(optim, adam, True, True)])


def _optimizer(groups: Any) -> dict[str, Any]:
    return {
        "optimizer": {"param_groups": list(groups)},
        "param_state_sharding_type": RESHARDABLE,
    }


def _group(
    optim: OptimConfig, adam: Mapping[str, Any], decays: bool, of_experts: bool
) -> dict[str, Any]:
    """Settings of the weights with decay, or of norms and biases, without the weights."""
    return {
        "wd_mult": 1.0 if decays else 0.0,
        "lr_mult": 1.0,
        "is_expert_parallel": of_experts,
        "is_decoupled_lr": False,
        "default_config": True,
        "max_lr": adam["lr"],
        "min_lr": None,
        "lr": adam["lr"],
        "betas": (adam["beta1"], optim.beta2),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay if decays else 0.0,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
        "step": adam["step"],
    }


def _scheduler(optim: OptimConfig, adam: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """State of Megatron-LM's scheduler: a constant rate. Other schedules are functions of tokens
    here, so a run of Megatron-LM sets its own: --override-opt_param-scheduler."""
    return {
        "max_lr": adam["lr"],
        "min_lr": adam["lr"],
        "lr_warmup_steps": 0,
        "lr_decay_steps": max(1, samples),
        "lr_decay_style": "constant",
        "num_steps": samples,
        "start_wd": optim.weight_decay,
        "end_wd": optim.weight_decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": max(1, samples),
    }
