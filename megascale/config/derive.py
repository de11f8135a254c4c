"""What follows from a config: derived values, the layout of ranks, and what cannot work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megascale.config.lr_curves import expand
from megascale.config.optimizers import OPTIMIZERS, own_options, titles_of_growable
from megascale.config.schema import (
    PLANNERS,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    RopeScalingConfig,
    RunConfig,
    SegmentConfig,
    StageConfig,
)
from megascale.errors import UserError
from megascale.parsing import is_plain_name

AT_LEAST_ONE = {
    "model": "num_layers hidden_size num_heads num_kv_heads head_dim ffn_hidden_size rope_base "
    "vocab_multiple sliding_window mask_tokens",
    "parallel": "tensor pipeline expert",
    "planner": "ahead_steps",
    "data": "context_tokens global_batch_tokens max_epochs",
    "train": "tokens threads stop_after_steps",
    "train.spikes": "patience_steps",
    "optim": f"max_skipped_steps {own_options(least=1)}",
    "checkpoint": "keep_last emergency_every_steps",
    "monitor": "log_every_steps",
    "eval": "sample_tokens",
    "model.moe": "num_experts ffn_hidden_size",
}
NOT_NEGATIVE = {
    "": "seed",
    "optim": f"eps weight_decay clip_grad_norm {own_options(least=0)}",
    "train.spikes": "window_steps deviations",
    "eval": "every_steps tokens",
    "monitor": "compare_ranks_every_steps",
    "checkpoint": "save_every_steps keep_every_steps",
    "model": "init_std norm_eps",
    "model.moe": "shared_ffn_hidden_size",
}
"""Options by section of the config; what is None is fine."""

AT_MOST: Mapping[str, Mapping[str, float]] = {
    "model": {"num_layers": 10_000, "vocab_size": 2**31, "vocab_multiple": 2**20}
    | dict.fromkeys("hidden_size num_heads num_kv_heads head_dim ffn_hidden_size".split(), 2**24),
    "model.moe": {"num_experts": 2**16, "attention_experts": 2**16}
    | dict.fromkeys(("ffn_hidden_size", "shared_ffn_hidden_size"), 2**24),
    "parallel": dict.fromkeys(("tensor", "pipeline", "expert"), 2**20),
    "data": {"context_tokens": 2**40, "global_batch_tokens": 2**40},
    "planner": {"ahead_steps": 1000, "capacity_tokens": 2**40, "timeout_s": 1e6},
    "train": {"threads": 2**16},
    "train.spikes": {"window_steps": 10**6},
}
"""More than any run has. Time and memory of what is derived from a config follow these sizes."""
MOST_DIVISOR = 100_000
"""Largest value that is tried for a suggestion."""
LOSSES = ("global", "micro", "sequence", "none")
BALANCES_WITH = {
    "balance_weight": LOSSES,
    "balance_weights": LOSSES,
    "micro_share": ("global",),
    "estimate": ("global",),
    "bias_rate": ("loss_free",),
}
"""Options of experts that are for some values of `model.moe.balance` alone."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes over which ranks are laid out; tensor * pipeline * hdp = world."""

    world: int
    tensor: int
    pipeline: int
    expert: int
    hdp: int

    @property
    def mode(self) -> Literal["free", "aligned", "lockstep"]:
        """Execution mode that the planner optimises (design, decision 6)."""
        if self.expert > 1:
            return "lockstep"
        return "aligned" if self.pipeline > 1 else "free"

    @staticmethod
    def of(config: RunConfig, world: int) -> Layout:
        """Layout of `config` on `world` ranks. Raises UserError where it does not fit."""
        cut = config.parallel
        model_ranks = cut.tensor * cut.pipeline
        if world < 1 or world % model_ranks:
            raise UserError(
                f"parallel.tensor * parallel.pipeline = {model_ranks} must divide the {world} "
                f"ranks started; start {model_ranks * max(1, world // model_ranks)} ranks, "
                f"or set {_nearest_cut(config, world)}"
            )
        hdp = world // model_ranks
        if hdp % cut.expert:
            raise UserError(
                f"parallel.expert = {cut.expert} must divide the HDP axis of {hdp} ranks "
                f"({world} ranks / tensor {cut.tensor} / pipeline {cut.pipeline}); "
                f"start {cut.expert * model_ranks} ranks, or set parallel.expert=1"
            )
        _require_room(config, hdp)
        return Layout(world, cut.tensor, cut.pipeline, cut.expert, hdp)


def _nearest_cut(config: RunConfig, world: int) -> str:
    """The nearest tensor and pipeline sizes that fit the model and `world` ranks, as overrides."""
    cut, model = config.parallel, config.model
    fits = [
        (tensor, pipeline)
        for tensor in _divisors(math.gcd(*_cut_by_tensor(model).values()))
        for pipeline in _divisors(model.num_layers)
        if world % (tensor * pipeline) == 0
    ]
    tensor, pipeline = min(
        fits, key=lambda one: abs(one[0] - cut.tensor) + abs(one[1] - cut.pipeline)
    )
    words = [f"parallel.tensor={tensor}"] * (tensor != cut.tensor)
    return " ".join(words + [f"parallel.pipeline={pipeline}"] * (pipeline != cut.pipeline))


def _require_room(config: RunConfig, hdp: int) -> None:
    """The longest sequence must fit all ranks together, offload included."""
    context, capacity = config.data.context_tokens, config.planner.capacity_tokens
    if capacity is None or context <= capacity * hdp:
        return
    if config.planner.host_copy_bytes_per_s is not None:
        layers = max(2, config.model.num_layers // config.parallel.pipeline)
        capacity = capacity * layers // 2
    if context > capacity * hdp:
        raise UserError(
            f"data.context_tokens = {context} does not fit the {hdp} ranks of the HDP axis, "
            f"which hold {capacity} tokens each; set planner.capacity_tokens="
            f"{-(-context // hdp)} or above, or start more ranks"
        )


def finalize(config: RunConfig, source_tokens: Mapping[str, int], vocab_size: int) -> RunConfig:
    """Fill every derived field and validate the result.

    `source_tokens` gives the training tokens of each source and `vocab_size` the largest
    vocabulary among them (see `corpus.sources`). The result does not depend on the number of
    ranks, so that a run can be resumed on another one; finalizing twice changes nothing.
    Raises UserError with the option and a value that works.
    """
    if isinstance(config.optim.lr, str) or isinstance(config.data.global_batch_tokens, str):
        raise UserError(
            "optim.lr or data.global_batch_tokens is steplaw where a number is needed; "
            "megascale hparams steplaw prints it"
        )
    model = _finalize_model(config.model, vocab_size)
    parallel = config.parallel
    if parallel.sequence_parallel is None:
        parallel = replace(parallel, sequence_parallel=parallel.tensor > 1)
    total = sum(source_tokens.values()) or 1
    blend = {name: tokens / total for name, tokens in source_tokens.items()}
    data = replace(config.data, stages=config.data.stages or (StageConfig(blend=blend),))
    planner = config.planner
    if planner.capacity_tokens is None:
        planner = replace(planner, capacity_tokens=data.context_tokens)
    config = replace(
        config,
        model=model,
        parallel=parallel,
        data=data,
        planner=planner,
        optim=_finalize_optim(config.optim, config.train.tokens),
    )
    validate(config)
    return config


def _finalize_model(model: ModelConfig, vocab_size: int) -> ModelConfig:
    ffn = model.ffn_hidden_size or -(-model.hidden_size * 8 // 3 // 64) * 64
    moe = model.moe
    if moe is not None and moe.ffn_hidden_size is None:
        moe = replace(moe, ffn_hidden_size=max(1, ffn // max(1, moe.top_k)))
    return replace(
        model,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.hidden_size // max(1, model.num_heads),
        ffn_hidden_size=ffn,
        vocab_size=vocab_size if model.vocab_size is None else model.vocab_size,
        moe=moe,
    )


def _finalize_optim(optim: OptimConfig, tokens: int) -> OptimConfig:
    beta1 = optim.beta1
    if beta1 is None:
        beta1 = OPTIMIZERS[optim.name].beta1
    return expand(replace(optim, beta1=beta1), tokens)


def validate(config: RunConfig) -> None:
    """Raise UserError for the first impossible combination, naming a value that works."""
    _validate_names(config)
    _validate_numbers(config)
    _validate_model(config)
    _validate_data(config)
    _validate_schedule(config)
    _validate_growth(config)


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


def _numbers(config: RunConfig, sections: Mapping[str, str]) -> Iterator[tuple[str, int | float]]:
    """(dotted name, value) of the options that `sections` name, where they are set."""
    for section, names in sections.items():
        part: Any = config
        for step in filter(None, section.split(".")):
            part = getattr(part, step, None)
        for name in names.split():
            if part is not None and (value := getattr(part, name)) is not None:
                yield f"{section}.{name}".lstrip("."), value


def _validate_names(config: RunConfig) -> None:
    for name, text in (
        ("run_dir", config.run_dir),
        ("checkpoint.emergency_dir", config.checkpoint.emergency_dir),
    ):
        if text is not None and not is_plain_name(text):
            raise UserError(
                f"{name} = {text!r} is empty or has control characters; give a plain path"
            )


def _validate_numbers(config: RunConfig) -> None:
    for section, limits in AT_MOST.items():
        for name, value in _numbers(config, {section: " ".join(limits)}):
            if value > (most := limits[name.rpartition(".")[2]]):
                raise UserError(f"{name} = {value} must be at most {most}")
    for name, value in _numbers(config, AT_LEAST_ONE):
        if value < 1:
            raise UserError(f"{name} = {value} must be at least 1")
    for name, value in _numbers(config, NOT_NEGATIVE):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name} = {value} must be a finite number, at least 0")
    alarm = config.eval.forgetting_alarm
    if alarm is not None and not 0 <= alarm < float("inf"):
        raise UserError(f"eval.forgetting_alarm = {alarm} must be at least 0, such as 0.05")
    copy = config.planner.host_copy_bytes_per_s
    if copy is not None and not 0 < copy < float("inf"):
        raise UserError(
            f"planner.host_copy_bytes_per_s = {copy} must be finite and above 0, such as 25e9; "
            "leave it out to keep activations on the device"
        )
    if config.planner.name not in PLANNERS and ":" not in config.planner.name:
        raise UserError(
            f"planner.name = {config.planner.name} must be one of {', '.join(PLANNERS)}, or "
            "module:function"
        )
    speeds = config.planner.rank_speeds
    needs = {"planner.name": config.planner.name == "hybrid"}
    needs["monitor.compare_ranks_every_steps"] = config.monitor.compare_ranks_every_steps > 0
    for name, fits in needs.items():
        if speeds == "measured" and not fits:
            works = {"planner.name": "hybrid"}.get(name, 10)
            raise UserError(f"planner.rank_speeds = measured needs {name}={works}")
    timeout_s = config.planner.timeout_s
    if not 0 < timeout_s < float("inf"):
        raise UserError(
            f"planner.timeout_s = {timeout_s} must be a finite number above 0, such as 30"
        )
    for name, beta in (("beta1", config.optim.beta1), ("beta2", config.optim.beta2)):
        if beta is not None and not 0 <= beta < 1:
            raise UserError(f"optim.{name} = {beta} must be at least 0 and below 1")
    profile = config.monitor.profile_steps
    if profile is not None and not 0 < profile[0] <= profile[1]:
        raise UserError(f"monitor.profile_steps = {list(profile)} must be [first, last], from 1 on")


def _validate_model(config: RunConfig) -> None:
    model, cut = config.model, config.parallel
    assert model.num_kv_heads is not None and model.head_dim is not None
    assert model.vocab_size is not None and model.ffn_hidden_size is not None
    _divides("parallel.tensor", cut.tensor, _cut_by_tensor(model))
    _divides("parallel.pipeline", cut.pipeline, {"model.num_layers": model.num_layers})
    _divides("model.num_kv_heads", model.num_kv_heads, {"model.num_heads": model.num_heads})
    if model.head_dim % 2:
        raise UserError(
            f"model.head_dim = {model.head_dim} must be even, because rotary embeddings turn "
            f"pairs; {model.head_dim + 1} works"
        )
    _validate_rope(model.rope_scaling)
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
    if not 0 <= scaling.low_turns < scaling.high_turns < math.inf:
        raise UserError(
            f"model.rope_scaling.low_turns = {scaling.low_turns:g} must be below high_turns = "
            f"{scaling.high_turns:g}, such as 1 and 4"
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
            works = min(_divisors(math.gcd(*wholes.values())), key=lambda one: abs(one - value))
            raise UserError(
                f"{name} = {value} does not divide {whole_name} = {whole}; {works} would work"
            )


def _divisors(whole: int) -> list[int]:
    return [one for one in range(1, min(whole, MOST_DIVISOR) + 1) if whole % one == 0]


def _cut_by_tensor(model: ModelConfig) -> dict[str, int]:
    """What parallel.tensor must divide, of a config that need not be finalized."""
    kv_heads = model.num_kv_heads or model.num_heads
    sizes = {"model.num_heads": model.num_heads, "model.num_kv_heads": kv_heads}
    ffn = model.ffn_hidden_size
    return sizes if ffn is None else sizes | {"model.ffn_hidden_size": ffn}


def _validate_data(config: RunConfig) -> None:
    data, capacity = config.data, config.planner.capacity_tokens
    assert capacity is not None
    if capacity < data.context_tokens and config.planner.name == "longest_first":
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
