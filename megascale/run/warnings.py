"""Options that will have no effect, and runs that are allowed but rarely meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megascale.config import Layout, OptimConfig, RunConfig
from megascale.config.lr_curves import options_of
from megascale.config.optimizers import OPTIMIZERS
from megascale.corpus.batches import step_tokens, used_sources
from megascale.corpus.run_length import RunLength
from megascale.model.counts import count_parameters
from megascale.optim import steplaw
from megascale.optim.schedule import lr_at

FP32_BYTES = 4
MANY_EPOCHS = 4
"""Passes up to which repeated text is nearly as good as new (Muennighoff et al., 2023)."""


def warnings_of(
    config: RunConfig,
    layout: Layout,
    epochs: Mapping[str, float],
    has_heldout: Mapping[str, bool],
    num_sequences: int,
    length: RunLength,
) -> list[str]:
    """One line per oddity of a finalized config.

    `epochs` are the passes over each source that is read, `has_heldout` says which sources can
    be evaluated, `num_sequences` are those of step 0, and `length` is that of the run.
    """
    return [
        *data_warnings(config, epochs, has_heldout),
        *_stages(config, length),
        *_model(config, layout, num_sequences),
        *_steps(config, length),
        *_step_law(config),
    ]


def data_warnings(
    config: RunConfig, epochs: Mapping[str, float], has_heldout: Mapping[str, bool]
) -> Iterator[str]:
    """Those of `warnings_of` that are about sources."""
    data = config.data
    for name, passes in epochs.items():
        if passes > MANY_EPOCHS:
            yield (
                f"source '{name}' is read {passes:.1f} times; beyond {MANY_EPOCHS} passes, "
                "repeated text teaches much less than new text"
            )
    used = used_sources(data.stages)
    for name in data.sources:
        if name not in used and not data.sources[name].replay:
            yield f"source '{name}' is in no blend and will not be read"
        if config.eval.tokens and not has_heldout[name]:
            yield f"source '{name}' has no held-out documents and will not be evaluated"


def _stages(config: RunConfig, length: RunLength) -> Iterator[str]:
    stages = config.data.stages
    for index in set(range(len(stages))).difference(length.stages):
        if index > length.stages[-1]:
            yield f"data.stages[{index}] begins after the end of training and has no effect"
        else:
            yield (
                f"data.stages[{index}] of {stages[index].tokens} tokens begins and ends inside one "
                "step and has no effect"
            )
    lasts = stages[-1].tokens
    if lasts is not None and sum(one.tokens or 0 for one in stages) < config.train.tokens:
        yield "data.stages end before train.tokens; the last blend goes on to the end"


def _model(config: RunConfig, layout: Layout, num_sequences: int) -> Iterator[str]:
    window, context = config.model.sliding_window, config.data.context_tokens
    if window is not None and window >= context:
        yield f"model.sliding_window = {window} has no effect on a context of {context} tokens"
    if config.model.mask_tokens is not None and config.start.checkpoint is None:
        yield "model.mask_tokens has no effect without start.checkpoint; random models are open"
    grows = config.growth
    opening = (grows.mask_tokens if grows is not None else config.model.mask_tokens) or 0
    if opening > config.train.tokens:
        yield (
            f"the new layers open over {opening:,} tokens, but training ends at "
            f"{config.train.tokens:,}, when they are {config.train.tokens / opening:.0%} open"
        )
    if num_sequences < layout.hdp:
        yield (
            f"step 0 has {num_sequences} sequences for {layout.hdp} HDP ranks, so some ranks idle; "
            "raise data.global_batch_tokens or start fewer ranks"
        )
    if config.device == "cuda":
        yield from cuda_warnings(config)
    if config.planner.chunk_cache == "host" and config.planner.chunks == 1:
        yield "planner.chunk_cache = host has no effect with planner.chunks = 1"
    if config.device == "cpu" and config.monitor.memory_snapshot:
        yield "monitor.memory_snapshot has no effect without CUDA"
    for name in (name for one in OPTIMIZERS.values() for name in one.options):
        changed = getattr(config.optim, name) != getattr(OptimConfig, name)
        if changed and name not in OPTIMIZERS[config.optim.name].options:
            yield f"optim.{name} has no effect with optim.name = {config.optim.name}"


def cuda_warnings(config: RunConfig) -> Iterator[str]:
    """One line per option of a finalized config that is rarely meant on CUDA."""
    if config.train.threads is not None:
        yield "train.threads has no effect on CUDA"
    if config.train.precision == "fp32":
        tokens = min(config.data.context_tokens, config.planner.capacity_tokens or 0)
        heads = config.model.num_heads // config.parallel.tensor
        gib = FP32_BYTES * heads * tokens**2 / 2**30
        yield (
            "train.precision = fp32 on CUDA keeps the attention scores of a sequence in memory: "
            f"{gib:,.2f} GiB in each layer for {tokens:,} tokens, quadratic in the tokens; "
            "train.precision=bf16 keeps none"
        )


def _steps(config: RunConfig, length: RunLength) -> Iterator[str]:
    if config.start.checkpoint is None:
        for name, default in (("optimizer", "reset"), ("data", "continue")):
            if getattr(config.start, name) != default:
                yield f"start.{name} has no effect without start.checkpoint"
    steps, batch = length.num_steps, config.data.global_batch_tokens
    mean, pieces = length.num_tokens / steps, len(config.data.sources) * len(config.data.stages)
    rest = length.num_tokens - steps * batch  # that the last pieces of sources do not explain
    if rest > pieces * config.data.context_tokens and mean > 1.1 * batch:
        yield (
            f"data.global_batch_tokens = {batch} is less than a sequence, and a step takes at "
            f"least one: {mean:,.0f} tokens on average"
        )
    if config.train.tokens < step_tokens(config.data, 0):
        yield (
            f"train.tokens = {config.train.tokens} is less than one step of "
            f"{step_tokens(config.data, 0)} tokens; one step is run"
        )
    save, keep = config.checkpoint.save_every_steps, config.checkpoint.keep_every_steps
    if save and keep % save:
        yield (
            f"checkpoint.keep_every_steps = {keep} is not a multiple of save_every_steps = {save}; "
            "only steps divisible by both are kept for ever"
        )
    stop = config.train.stop_after_steps
    if stop is not None and stop >= steps:
        yield f"train.stop_after_steps = {stop} has no effect on a run of {steps} steps"
    profile = config.monitor.profile_steps
    if profile is not None and profile[0] > steps:
        yield f"monitor.profile_steps begins after the last step, {steps}"
    yield from _schedule(config)


def _schedule(config: RunConfig) -> Iterator[str]:
    tokens, schedule = config.train.tokens, config.optim.schedule
    covered = sum(segment.tokens or 0 for segment in schedule)
    if covered <= tokens:
        return
    end_lr, named = lr_at(tokens, schedule), options_of(schedule)
    if named is not None and named.warmup_tokens is not None and named.warmup_tokens >= tokens:
        yield (
            f"optim.warmup_tokens = {named.warmup_tokens} does not end before training does, at "
            f"train.tokens = {tokens}: the rate rises to {end_lr:.3g} of {schedule[0].lr:.3g}; "
            f"optim.warmup_tokens={max(1, tokens // 100)} is 1 % of the run"
        )
        return
    yield (
        f"optim.schedule lasts {covered} tokens but training ends at {tokens}, "
        f"at a rate of {end_lr:.3g}"
    )


def _step_law(config: RunConfig) -> Iterator[str]:
    """A finalized config does not say where its numbers come from, but they are the law's own."""
    parameters = count_parameters(config.model).non_embedding
    tokens, has_experts = config.train.tokens, config.model.moe is not None
    peak = max(segment.lr for segment in config.optim.schedule)
    of_law = {
        "learning rate": peak == steplaw.peak_lr(parameters, tokens),
        "data.global_batch_tokens": config.data.global_batch_tokens == steplaw.batch_tokens(tokens),
    }
    named = " and ".join(name for name, is_of_law in of_law.items() if is_of_law)
    if named and not steplaw.is_fitted(parameters, tokens, has_experts):
        yield (
            f"{named}: the Step Law was fitted on {steplaw.fitted_range(has_experts)}, not for "
            f"{parameters:,} without vocabulary and {tokens:,} tokens"
        )
