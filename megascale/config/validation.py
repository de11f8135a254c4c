"""What cannot work in a config: options that are impossible, alone or together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megascale.config.layout import cut_by_tensor, divisors
from megascale.config.limits import require_names, require_numbers
from megascale.config.optimizers import OPTIMIZERS, titles_of_growable
from megascale.config.schema import (
    ModelConfig,
    MoeConfig,
    RopeScalingConfig,
    RunConfig,
    SegmentConfig,
    StageConfig,
)
from megascale.errors import UserError

LOSSES = ("global", "micro", "sequence", "none")
BALANCES_WITH = {
    "balance_weight": LOSSES,
    "balance_weights": LOSSES,
    "micro_share": ("global",),
    "estimate": ("global",),
    "bias_rate": ("loss_free",),
}
"""Options of experts that are for some values of `model.moe.balance` alone."""
FLASH_MULTIPLE, FLASH_MOST = 8, 256
"""Head sizes of FlashAttention on CUDA: multiples of the first up to the second."""


def validate(config: RunConfig) -> None:
    """Raise UserError for the first impossible combination, naming a value that works."""
    require_names(config)
    require_numbers(config)
    _validate_model(config)
    _validate_data(config)
    _validate_schedule(config)
    _validate_growth(config)
    _validate_recompute(config)
    if config.device == "cuda":
        validate_on_cuda(config)


def validate_on_cuda(config: RunConfig) -> None:
    """Raise UserError for what CUDA cannot run, naming a value that works."""
    size = config.model.head_dim
    assert size is not None
    if config.train.precision == "fp32":  # it takes plain attention
        return
    if size % FLASH_MULTIPLE or size > FLASH_MOST:
        works = min(-(-size // FLASH_MULTIPLE) * FLASH_MULTIPLE, FLASH_MOST)
        raise UserError(
            f"model.head_dim = {size} must be a multiple of {FLASH_MULTIPLE} up to {FLASH_MOST}, "
            f"because FlashAttention runs on CUDA in {config.train.precision}; {works} works"
        )


def _validate_recompute(config: RunConfig) -> None:
    train, has = config.train, sorted(config.recomputable_parts)
    if train.recompute == "selective" and config.model.implementation == "transformer_engine":
        raise UserError("train.recompute=selective needs model.implementation=local")
    if train.recompute_parts is None:
        return
    if train.recompute != "selective":
        raise UserError(
            f"train.recompute_parts goes with train.recompute=selective, not {train.recompute}"
        )
    if not train.recompute_parts:
        raise UserError("train.recompute_parts is empty; set train.recompute=none")
    for part in train.recompute_parts:
        if part not in has:
            raise UserError(
                f"train.recompute_parts has {part}, which the model does not have; it has "
                + ", ".join(has)
            )


def _validate_growth(config: RunConfig) -> None:
    growth = config.growth
    if growth is None:
        return
    if config.start.checkpoint is not None:
        raise UserError(
            "growth trains a small model from its beginning, and start.checkpoint begins with "
            "another run's; branch first, then 'megascale grow' the branch and branch from that"
        )
    if growth.at_tokens < 1:
        raise UserError(f"growth.at_tokens = {growth.at_tokens} must be at least 1")
    if growth.at_tokens > config.train.tokens:
        raise UserError(
            f"growth.at_tokens = {growth.at_tokens} is above train.tokens = "
            f"{config.train.tokens}, whose schedule the small model follows; lower it"
        )
    if growth.factor < 2:
        raise UserError(f"growth.factor = {growth.factor} must be at least 2")
    if not 0 <= growth.noise < 1:
        raise UserError(f"growth.noise = {growth.noise} must be from 0 to below 1")
    if (growth.mask_tokens or 0) < 1 and growth.operator == "random":
        raise UserError(
            "growth.operator = random needs growth.mask_tokens, over which the new layers open, "
            f"such as {max(1, config.train.tokens // 10)}"
        )
    if growth.mask_tokens is not None and growth.operator != "random":
        raise UserError(
            f"growth.mask_tokens goes with growth.operator = random, not {growth.operator}"
        )
    if growth.noise and growth.operator in ("zero", "random", "width"):
        raise UserError(
            f"growth.noise = {growth.noise} would undo that growth.operator = {growth.operator} "
            "keeps the function; set it to 0"
        )
    if growth.optimizer == "grow" and not OPTIMIZERS[config.optim.name].means:
        raise UserError(
            f"growth.optimizer = grow grows {titles_of_growable()}'s moments; optim.name = "
            f"{config.optim.name} has others, so leave it out"
        )
    if config.train.stop_after_steps is not None:
        raise UserError("train.stop_after_steps and growth are both set; remove one")


def _validate_model(config: RunConfig) -> None:
    model, cut = config.model, config.parallel
    assert model.num_kv_heads is not None and model.head_dim is not None
    assert model.vocab_size is not None and model.ffn_hidden_size is not None
    _divides("parallel.tensor", cut.tensor, cut_by_tensor(model))
    _divides("parallel.pipeline", cut.pipeline, {"model.num_layers": model.num_layers})
    _divides("model.num_kv_heads", model.num_kv_heads, {"model.num_heads": model.num_heads})
    if model.head_dim % 2:
        raise UserError(
            f"model.head_dim = {model.head_dim} must be even, because rotary embeddings turn "
            f"pairs; {model.head_dim + 1} works"
        )
    _validate_rope(model.rope_scaling)
    _validate_pattern(model)
    _validate_norms(model)
    if not model.vocab_size >= 1:
        raise UserError(f"model.vocab_size = {model.vocab_size} must be at least 1")
    if cut.sequence_parallel and cut.tensor == 1:
        raise UserError("parallel.sequence_parallel=true needs parallel.tensor > 1; remove it")
    if model.moe is None:
        if cut.expert > 1:
            raise UserError(f"parallel.expert = {cut.expert} needs model.moe; set it to 1")
        return
    if model.parallel_block:
        raise UserError("model.parallel_block with model.moe is not built; set one of them off")
    _divides("parallel.expert", cut.expert, {"model.moe.num_experts": model.moe.num_experts})
    if not 1 <= model.moe.top_k <= model.moe.num_experts:
        raise UserError(
            f"model.moe.top_k = {model.moe.top_k} must be from 1 to model.moe.num_experts = "
            f"{model.moe.num_experts}"
        )
    if model.moe.attention_experts < 1:
        raise UserError(
            f"model.moe.attention_experts = {model.moe.attention_experts} must be at least 1"
        )
    _validate_balance(model.moe, model.num_layers)


def _validate_rope(scaling: RopeScalingConfig | None) -> None:
    if scaling is None:
        return
    if not 1 <= scaling.factor < math.inf or scaling.original_tokens < 1:
        raise UserError(
            f"model.rope_scaling: factor = {scaling.factor:g} and original_tokens = "
            f"{scaling.original_tokens} must be at least 1, such as 8 and 8192"
        )
    if not 0 <= scaling.low_turns < scaling.kept_turns < math.inf:
        raise UserError(
            f"model.rope_scaling.low_turns = {scaling.low_turns:g} must be below high_turns = "
            f"{scaling.kept_turns:g}, such as 1 and 4"
        )
    if scaling.kind == "yarn" and scaling.low_turns == 0:
        raise UserError("model.rope_scaling.low_turns = 0 has no place in yarn; 1 works")
    if not 0 < scaling.amplitude < math.inf:
        raise UserError(
            f"model.rope_scaling.attention_factor = {scaling.attention_factor} must be above 0; "
            "leave it out"
        )


def _validate_norms(model: ModelConfig) -> None:
    if model.qk_norm_heads == "all" and not model.qk_norm:
        raise UserError("model.qk_norm_heads = all goes with model.qk_norm; set it to true")
    several = model.moe is not None or model.parallel_block
    if model.norm_position == "after" and several:
        raise UserError(
            "model.norm_position = after is not built with model.moe or model.parallel_block; set "
            "it to before"
        )


def _validate_pattern(model: ModelConfig) -> None:
    """Windows and layers that have one belong together."""
    slides = any(kind.startswith("sliding") for kind in model.attention_pattern)
    if slides and model.sliding_window is None:
        raise UserError(
            "model.attention_pattern has sliding layers; set model.sliding_window, such as 4096"
        )
    if model.attention_pattern and not slides and model.sliding_window is not None:
        raise UserError(
            f"model.sliding_window = {model.sliding_window}, and model.attention_pattern has no "
            "sliding layer; remove one of them"
        )
    if model.local_rope_base is not None and model.sliding_window is None:
        raise UserError(
            "model.local_rope_base is that of layers with a window; set model.sliding_window, or "
            "set model.rope_base alone"
        )


def _validate_balance(moe: MoeConfig, num_layers: int) -> None:
    if moe.shared_gate and not moe.shared_ffn_hidden_size:
        raise UserError("model.moe.shared_gate weighs model.moe.shared_ffn_hidden_size, which is 0")
    weights = moe.balance_weights
    if weights is not None and len(weights) != num_layers:
        raise UserError(
            f"model.moe.balance_weights has {len(weights)} values; give one for each of the "
            f"{num_layers} layers, or model.moe.balance_weight for all"
        )
    names = ("balance_weight", "micro_share", "bias_rate", "z_loss_coeff")
    values = [(f"model.moe.{name}", getattr(moe, name)) for name in names]
    values += [(f"model.moe.balance_weights[{i}]", one) for i, one in enumerate(weights or ())]
    for name, value in values:
        if not 0 <= value < math.inf:
            raise UserError(f"{name} = {value} must be a finite number, at least 0")
    for name, fitting in BALANCES_WITH.items():
        value, usual = getattr(moe, name), getattr(MoeConfig, name)
        if value != usual and moe.balance not in fitting:
            raise UserError(
                f"model.moe.{name} = {value} goes with model.moe.balance={' or '.join(fitting)}, "
                f"not {moe.balance}; leave it out, or at {usual}"
            )


def _divides(name: str, value: int, wholes: Mapping[str, int]) -> None:
    """Raise UserError where `value` does not divide all of `wholes`, with the nearest that does."""
    for whole_name, whole in wholes.items():
        if whole % value:
            works = min(divisors(math.gcd(*wholes.values())), key=lambda one: abs(one - value))
            raise UserError(
                f"{name} = {value} does not divide {whole_name} = {whole}; {works} would work"
            )


def _validate_data(config: RunConfig) -> None:
    data, capacity = config.data, config.planner.capacity_tokens
    assert capacity is not None
    shares_none = config.planner.name == "longest_first" and not config.has_auto_capacity
    if shares_none and capacity < data.context_tokens:
        raise UserError(
            f"planner.capacity_tokens = {capacity} is below data.context_tokens = "
            f"{data.context_tokens}, and planner.name = longest_first shares no sequence; "
            f"set planner.capacity_tokens={data.context_tokens} or planner.name=hybrid"
        )
    budget_s = config.planner.budget_s
    if budget_s is not None and not 0 <= budget_s < float("inf"):
        raise UserError(f"planner.budget_s = {budget_s} must be at least 0, such as 0.5")
    if not 0 <= data.replay_fraction < 1:
        raise UserError(
            f"data.replay_fraction = {data.replay_fraction} must be from 0 to below 1, such as 0.05"
        )
    if data.replay_fraction and config.start.checkpoint is None:
        raise UserError(
            f"data.replay_fraction = {data.replay_fraction} needs start.checkpoint, whose run has "
            "read what is replayed"
        )
    ramp = data.batch_ramp
    if ramp is not None and not 1 <= ramp.start_tokens <= data.global_batch_tokens:
        raise UserError(
            f"data.batch_ramp.start_tokens = {ramp.start_tokens} must be from 1 to "
            f"data.global_batch_tokens = {data.global_batch_tokens}"
        )
    if ramp is not None and not 1 <= ramp.over_tokens <= 2**50:
        raise UserError(
            f"data.batch_ramp.over_tokens = {ramp.over_tokens} must be from 1 to 2^50, such as "
            f"{max(1, config.train.tokens // 10)}"
        )
    if not data.sources:
        raise UserError("data.sources is empty; name at least one prepared corpus")
    for name, source in data.sources.items():
        shortest, longest = source.min_document_tokens, source.max_document_tokens
        if shortest < 0:
            raise UserError(
                f"data.sources.{name}.min_document_tokens = {shortest} must be at least 0"
            )
        if longest is not None and longest < max(1, shortest):
            raise UserError(
                f"data.sources.{name}.max_document_tokens = {longest} must be at least "
                f"{max(1, shortest)} (min_document_tokens), or null for no limit"
            )
    for index, stage in enumerate(data.stages):
        _validate_stage(config, index, stage)


def _validate_stage(config: RunConfig, index: int, stage: StageConfig) -> None:
    where, last = f"data.stages[{index}]", index == len(config.data.stages) - 1
    for name, share in stage.blend.items():
        if name not in config.data.sources:
            known = ", ".join(config.data.sources)
            raise UserError(f"{where}.blend names '{name}'; data.sources has: {known}")
        if not 0 <= share < float("inf"):
            raise UserError(f"{where}.blend.{name} = {share} must be a share, at least 0")
    if sum(stage.blend.values()) <= 0:
        raise UserError(f"{where}.blend is empty; give each source a share, e.g. {{web: 1.0}}")
    if (stage.tokens is None and not last) or (stage.tokens is not None and stage.tokens < 1):
        raise UserError(f"{where}.tokens must be at least 1; only the last stage may leave it out")


def _validate_schedule(config: RunConfig) -> None:
    *body, last = config.optim.schedule
    begin_lr = 0.0
    for index, segment in enumerate(config.optim.schedule):
        _validate_segment(f"optim.schedule[{index}]", segment, begin_lr)
        begin_lr = segment.lr
    if any(segment.tokens is None for segment in body):
        raise UserError("optim.schedule: only the last segment may leave out tokens")
    if last.tokens is None and last.shape != "constant":
        raise UserError(f"optim.schedule: a last {last.shape} segment needs tokens")
    covered = sum(segment.tokens or 0 for segment in config.optim.schedule)
    if last.tokens is not None and covered < config.train.tokens:
        raise UserError(
            f"optim.schedule covers {covered} tokens but train.tokens = {config.train.tokens}; "
            "lengthen the last segment or end with one that has no tokens"
        )


def _validate_segment(where: str, segment: SegmentConfig, begin_lr: float) -> None:
    if not 0 <= segment.lr < float("inf"):
        raise UserError(f"{where}.lr = {segment.lr} must be a finite number, at least 0")
    if segment.tokens is not None and segment.tokens < 1:
        raise UserError(f"{where}.tokens = {segment.tokens} must be at least 1")
    if segment.shape == "exponential" and not (begin_lr and segment.lr):
        raise UserError(
            f"{where}: an exponential segment cannot go from {begin_lr:g} to lr = {segment.lr:g}; "
            "let both be above 0, such as 1e-5, or use shape: linear"
        )
    if segment.shape == "inverse_sqrt" and not 1e-3 <= segment.timescale <= 1e6:
        raise UserError(f"{where}.timescale = {segment.timescale:g} must be from 0.001 to 1e6")
    if segment.shape != "inverse_sqrt" and segment.timescale != SegmentConfig.timescale:
        raise UserError(f"{where}.timescale goes with shape: inverse_sqrt, not {segment.shape}")
