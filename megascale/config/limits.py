"""Limits of options, most of which hold whatever the other options are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megascale.config.optimizers import own_options
from megascale.config.schema import PLANNERS, RunConfig
from megascale.errors import UserError
from megascale.parsing import is_plain_name

AT_LEAST_ONE = {
    "model": "num_layers hidden_size num_heads num_kv_heads head_dim ffn_hidden_size rope_base "
    "local_rope_base vocab_multiple sliding_window mask_tokens",
    "parallel": "tensor pipeline expert",
    "planner": "ahead_steps chunks",
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
    "planner": {"ahead_steps": 1000, "chunks": 256, "capacity_tokens": 2**40, "timeout_s": 1e6},
    "train": {"threads": 2**16},
    "train.spikes": {"window_steps": 10**6},
}
"""More than any run has. Time and memory of what is derived from a config follow these sizes."""


def _numbers(config: RunConfig, sections: Mapping[str, str]) -> Iterator[tuple[str, int | float]]:
    """(dotted name, value) of the options that `sections` name, where they are set."""
    for section, names in sections.items():
        part: Any = config
        for step in filter(None, section.split(".")):
            part = getattr(part, step, None)
        for name in names.split():
            if part is not None and (value := getattr(part, name)) is not None:
                yield f"{section}.{name}".lstrip("."), value


def require_names(config: RunConfig) -> None:
    """Raise UserError for the first path that no folder can have."""
    for name, text in (
        ("run_dir", config.run_dir),
        ("checkpoint.emergency_dir", config.checkpoint.emergency_dir),
    ):
        if text is not None and not is_plain_name(text):
            raise UserError(
                f"{name} = {text!r} is empty or has control characters; give a plain path"
            )


def require_numbers(config: RunConfig) -> None:
    """Raise UserError for the first number outside its limits."""
    for section, limits in AT_MOST.items():
        for name, value in _numbers(config, {section: " ".join(limits)}):
            if not isinstance(value, str) and value > (most := limits[name.rpartition(".")[2]]):
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
    chunks = config.planner.chunks
    needs = {"planner.name=hybrid": config.planner.name == "hybrid"}
    needs["parallel.pipeline=2 or more"] = config.parallel.pipeline > 1
    for works, fits in needs.items():
        if chunks > 1 and not fits:
            raise UserError(f"planner.chunks = {chunks} needs {works}")
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
