"""The whole derived run as text, before anything is started: `megascale plan` and plan.txt.

Without torch: this answers in under a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megascale.config import Layout, MoeConfig, RunConfig
from megascale.corpus.batches import Cursor, shares, used_sources
from megascale.corpus.check import missing_ends
from megascale.corpus.run_length import RunLength, begin_after, run_length
from megascale.corpus.sources import SourceInfo
from megascale.devices.step_time import step_cost
from megascale.errors import UserError
from megascale.model import counts
from megascale.monitor.quantities import show_bytes
from megascale.optim.rank_memory import memory_per_rank
from megascale.optim.schedule import joints, lr_at
from megascale.planner import PLANNERS, Problem, StepPlan, timeline
from megascale.planner.gantt import LEGEND, text_gantt
from megascale.run.describe_device import describe_device
from megascale.run.earlier_runs import unwatched
from megascale.run.facts import step_sizes
from megascale.run.growing import small_and_grown
from megascale.run.heldout_sets import foreseen
from megascale.run.on_device import NamedDevice
from megascale.run.resolve import ResolvedRun, epochs_read, source_tokens
from megascale.run.same_tokenizer import warn_if_tokenizers_differ
from megascale.run.start import warn_if_rate_jumps
from megascale.run.step_problem import FirstStep, batches_of, first_step, plan_first
from megascale.run.warnings import warnings_of
from megascale.run.without_corpus import DrawnRun


def _missing_ends(sources: Mapping[str, SourceInfo]) -> list[str]:
    problems = {name: missing_ends(info) for name, info in sources.items()}
    return [
        f"source '{name}': {problem}; eod_id may be another, or megascale data check says more"
        for name, problem in problems.items()
        if problem is not None
    ]


def expected_lengths(config: RunConfig, sources: Mapping[str, SourceInfo]) -> list[RunLength]:
    """How long a run will be; before it, where it grows, how long its small model's will be."""
    batches, tokens = batches_of(config, sources), config.train.tokens
    if config.growth is None:
        return [run_length(batches, tokens, Cursor())]
    small = run_length(batches, config.growth.at_tokens, Cursor())
    return [small, run_length(batches, tokens, begin_after(small))]


def describe_run(
    run: ResolvedRun,
    layout: Layout,
    first: FirstStep | None = None,
    on: NamedDevice | None = None,
) -> str:
    """Everything that follows from a run's config, as text of many lines.

    `first` saves dealing step 0 again where it is at hand. With `on` the text has memory and time
    on that device too, for whose costs `first` is planned.
    """
    config, sources, start = run
    first = first or first_step(config, layout, sources)
    has_heldout = {name: info.heldout is not None for name, info in sources.items()}
    lengths = expected_lengths(config, sources)
    read = sum((Counter(one.read) for one in lengths), Counter())
    epochs, length = epochs_read(config, read, source_tokens(sources)), lengths[-1]
    warnings = warnings_of(config, layout, epochs, has_heldout, first.batch.num_sequences, length)
    warnings += warn_if_tokenizers_differ(config, sources)
    warnings += [*warn_if_rate_jumps(config, start), *unwatched(config)]
    warnings += _missing_ends(sources)
    sections = [
        _title(config, length),
        _model(config, first),
        _grown(config, layout, first),
        _layout(config, layout),
        _memory(config, layout),
        _data(config, sources, epochs),
        _learning_rate(config, first, length),
        _step(config, first, on),
        *_on_device(config, layout, first, on),
        _files(config),
        [f"warning: {warning}" for warning in warnings],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def describe_drawn(
    run: DrawnRun, layout: Layout, first: FirstStep, on: NamedDevice | None = None
) -> str:
    """What follows from a run's config alone, where lengths are drawn and no corpus is read."""
    config, length = run.config, run.length
    has_heldout = dict.fromkeys(config.data.sources, True)  # nothing says that one has none
    warnings = warnings_of(
        config, layout, run.epochs, has_heldout, first.batch.num_sequences, length
    )
    if run.missing_start is not None:
        warnings.append(
            f"start.checkpoint = {run.missing_start} is not there, so the model is as the config "
            "says, and its data is all new"
        )
    sections = [
        _title(config, length),
        _model(config, first),
        _grown(config, layout, first),
        _layout(config, layout),
        _memory(config, layout),
        _drawn(run),
        _learning_rate(config, first, length),
        _step(config, first, on),
        *_on_device(config, layout, first, on),
        [f"warning: {warning}" for warning in warnings],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _drawn(run: DrawnRun) -> list[str]:
    seed, context = run.config.seed, run.config.data.context_tokens
    lines = [
        f"data                    context {context:,} tokens",
        f"  lengths               drawn from {run.lengths}, seed {seed}; no source is read",
    ]
    for name, tokens in run.tokens.items():
        epochs = run.epochs.get(name, 0.0)
        lines.append(f"  {name:<21} {tokens:,} tokens (given), read {epochs:.2f} times")
    return [*lines, *_stages(run.config)]


def _title(config: RunConfig, length: RunLength) -> list[str]:
    steps = length.num_steps
    about = "about " * (length.end is None)
    lines = [
        f"run {config.run_dir}: {about}{steps:,} steps of {step_sizes(config.data)} "
        f"tokens to reach {config.train.tokens:,}, {config.train.precision}, seed {config.seed}",
        f"  takes {about}{length.num_tokens:,} tokens, {length.num_tokens / steps:,.0f} in a step",
    ]
    growth = config.growth
    if growth is not None:
        lines.append(
            f"  before it, in {config.run_dir}-base, the model below for {growth.at_tokens:,} "
            f"tokens; then {growth.operator} x {growth.factor}"
        )
    stop = config.train.stop_after_steps
    if stop is not None and stop < steps:
        lines.append(f"  stops early, after step {stop:,} (train.stop_after_steps)")
    return lines


def _model(config: RunConfig, first: FirstStep) -> list[str]:
    model, tensor = config.model, config.parallel.tensor
    sizes = counts.count_parameters(model, tensor)
    rows = counts.padded_vocab_size(model, tensor)
    flops = counts.batch_flops(model, first.batch.length, tensor) / first.batch.num_tokens
    lines = [
        "model",
        f"  shape                 {model.num_layers} layers x {model.hidden_size}, "
        f"{model.num_heads} heads and {model.num_kv_heads} key/value heads of {model.head_dim}, "
        f"feed-forward {model.ffn_hidden_size if model.moe is None else _experts(config)}",
        f"  vocabulary            {model.vocab_size:,} ids in {rows:,} rows, "
        f"{'tied' if model.tied_embeddings else 'untied'}",
        f"  parameters            {sizes.total:,}",
        f"  without embeddings    {sizes.non_embedding:,}",
        f"  FLOPs per token       {flops:,.0f} (forward and backward, mean of step 0)",
    ]
    if model.moe is not None:
        lines.insert(-1, f"  active per token      {sizes.active:,}")
        lines.append(f"  balance of experts    {_balance(model.moe)}")
    return lines


def _grown(config: RunConfig, layout: Layout, first: FirstStep) -> list[str]:
    if config.growth is None:
        return []
    _, grown, growth = small_and_grown(config)
    title = f"grown model             {growth.operator} x {growth.factor}"
    memory = memory_per_rank(grown, layout)
    room = f"  memory per rank       {show_bytes(memory.total)} on the fullest pipeline stage"
    return [title, *_model(grown, first)[1:], room]


def _balance(moe: MoeConfig) -> str:
    if moe.balance == "none":
        return "none"
    if moe.balance == "loss_free":
        return f"loss_free, biases move by {moe.bias_rate:g} a step"
    how = f" by {moe.estimate}" if moe.balance == "global" else ""
    share = f", {moe.micro_share:g} of it over micro-batches too" if moe.micro_share else ""
    weight = moe.balance_weights or moe.balance_weight
    return f"{moe.balance}{how}, weight {weight}{share}"


def _experts(config: RunConfig) -> str:
    moe = config.model.moe
    assert moe is not None
    shared = f" and a shared one of {moe.shared_ffn_hidden_size}" * bool(moe.shared_ffn_hidden_size)
    return f"{moe.top_k} of {moe.num_experts} experts of {moe.ffn_hidden_size}{shared}"


def _layout(config: RunConfig, layout: Layout) -> list[str]:
    has_experts = config.model.moe is not None or layout.expert > 1
    axes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x HDP {layout.hdp}"
    return [
        f"layout                  {layout.world} ranks = {axes}",
        *([f"  experts over          {layout.expert} ranks"] if has_experts else []),
        f"  mode                  {layout.mode}",
        f"  capacity              {config.planner.capacity_tokens:,} tokens per rank and "
        "micro-batch",
    ]


def _memory(config: RunConfig, layout: Layout) -> list[str]:
    memory = memory_per_rank(config, layout)
    rings = show_bytes(memory.rings)
    return [
        f"memory per rank         {show_bytes(memory.total)} on the fullest pipeline stage",
        f"  weights               {show_bytes(memory.weights)}",
        f"  gradients             {show_bytes(memory.gradients)}",
        f"  optimizer             {show_bytes(memory.optimizer)}",
        f"  activations           {show_bytes(memory.activations)} (estimate){_recomputed(config)}",
        *([f"  buffers of rings      {rings} (estimate)"] if memory.rings else []),
    ]


def _recomputed(config: RunConfig) -> str:
    if config.train.recompute == "full":
        return ", whole layers computed again"
    parts = ", ".join(sorted(config.recomputed_parts))
    return f", {parts} computed again" if parts else ""


def _data(
    config: RunConfig, sources: Mapping[str, SourceInfo], epochs: Mapping[str, float]
) -> list[str]:
    lines = [f"data                    context {config.data.context_tokens:,} tokens"]
    for name in used_sources(config.data.stages):
        info = sources[name]
        lines.append(
            f"  {name:<21} {info.train_tokens:,} tokens in {info.train_documents:,} documents, "
            f"read {epochs[name]:.2f} times"
        )
        if (fim := config.data.sources[name].fim) is not None:
            lines.append(
                f"  {'':<21} fill-in-the-middle: {fim.rate:.2%} of blocks of "
                f"{fim.block_tokens:,} tokens, {fim.spm:.2%} of these suffix first"
            )
    for name, part in foreseen(config, sources):
        lines.append(f"  {f'held-out {name}':<21} {part}")
    return [*lines, *_stages(config)]


def _stages(config: RunConfig) -> list[str]:
    lines, begin = [], 0
    for index, stage in enumerate(config.data.stages):
        blend = ", ".join(f"{name} {float(share):.2%}" for name, share in shares(stage).items())
        lines.append(f"  stage {index:<15} from {begin:,} tokens: {blend}")
        begin += stage.tokens or 0
    return lines


def _learning_rate(config: RunConfig, first: FirstStep, length: RunLength) -> list[str]:
    lines = ["learning rate           (of the step that reaches these tokens)"]
    begin, end = first.batch.num_tokens, config.train.tokens
    width = max(16, len(f"{end:,}"))
    points = dict(joints(config.optim.schedule))
    for tokens in (min(begin, end), end):
        points.setdefault(tokens, lr_at(tokens, config.optim.schedule))
    for tokens, lr in sorted(points.items()):
        if 0 < tokens <= end:
            step = length.step_reaching(tokens) - 1
            lines.append(f"  {tokens:>{width},} tokens {lr:.4g} in step {step:,}")
    return lines


def _on_device(
    config: RunConfig, layout: Layout, first: FirstStep, on: NamedDevice | None
) -> list[list[str]]:
    """Sections for each model that is trained: the small one and the grown one where it grows."""
    if on is None:
        return []
    if config.growth is None:
        return describe_device(config, layout, first, on, config.train.tokens)
    small, grown, _ = small_and_grown(config)
    cost = step_cost(grown, layout, on.device).cost
    after = plan_first(grown, layout, first.batch, cost)
    return [
        ["before growth"],
        *describe_device(small, layout, first, on, small.train.tokens),
        ["after growth"],
        *describe_device(grown, layout, after, on, grown.train.tokens),
    ]


def _step(config: RunConfig, first: FirstStep, on: NamedDevice | None) -> list[str]:
    batch, plan, cost = first.batch, first.plan, first.problem.cost
    length, times = batch.length, timeline(plan, batch.length, cost)
    over = plan.predicted_s / plan.lower_bound_s
    how = "uncalibrated cost" if on is None else f"estimate for {on.name}"
    if cost.calibrated:
        how = "calibrated cost"
    if cost.calibrated or on is not None:
        how = f"{plan.predicted_s:.4g} s, {how}"
    return [
        f"step 0                  {batch.num_tokens:,} tokens in {batch.num_sequences:,} "
        f"sequences of {int(length.min()):,} to {int(length.max()):,} (median "
        f"{int(np.median(length)):,}), {len(plan.rings):,} micro-batches",
        f"  planned by            {config.planner.name} in {plan.plan_s * 1e3:.1f} ms, "
        f"{over:.3f} x the lower bound ({how})",
        f"  imbalance             {times.imbalance:.3f} (step time over mean busy time)",
        f"  {static_line(first.problem, plan)}",
        *_pipeline(config.parallel.pipeline, plan),
        f"  {LEGEND}",
        *(f"  {row}" for row in text_gantt(plan, length, cost).splitlines()),
    ]


def static_line(problem: Problem, plan: StepPlan) -> str:
    """How static context parallelism compares: one ring size for all, packed in order."""
    try:
        static_s = PLANNERS["static"](problem).predicted_s
    except UserError as error:
        return f"static CP             cannot run this: {error}"
    faster = static_s / plan.predicted_s if plan.predicted_s else 1.0
    return f"static CP             {faster:.2f} x the time of this plan (predicted)"


def _pipeline(num_stages: int, plan: StepPlan) -> list[str]:
    """Idle part of a 1F1B pipeline, (p - 1) / (m + p - 1) for m equal micro-batches."""
    if num_stages == 1:
        return []
    fewest = min(plan.counts())
    bubble = (num_stages - 1) / (fewest + num_stages - 1)
    what = f"{num_stages} stages, at least {fewest} micro-batches"
    return [f"  pipeline bubble       {bubble:.1%} ({what})"]


def _files(config: RunConfig) -> list[str]:
    run_dir = Path(config.run_dir)
    kept = f"the last {config.checkpoint.keep_last}"
    if config.checkpoint.keep_every_steps:
        kept += f" and every {config.checkpoint.keep_every_steps:,} steps"
    every = config.checkpoint.save_every_steps
    lines = {
        "config.yaml": "this config, resolved",
        "plan.txt": "this text",
        "metrics.jsonl": "one line per step and per evaluation",
        "events.jsonl": "starts, stops, saves, skips, failures",
        "checkpoints/": f"{f'every {every:,} steps and ' if every else ''}at the end; keeps {kept}",
        "plots/": "by megascale plot",
        "logs/": "of each rank",
    }
    if config.model.moe is not None:
        lines["experts.jsonl"] = "use of experts by layer and source"
    if config.monitor.tensorboard:
        lines["tensorboard/"] = "the same numbers for TensorBoard"
    width = len(str(run_dir)) + 1 + max(map(len, lines))
    return ["files"] + [f"  {f'{run_dir}/{name}':<{width}}  {what}" for name, what in lines.items()]
