"""The whole derived run as text, before anything is started: `megascale plan` and plan.txt.

Without torch: this answers in under a second.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from shlex import quote

import numpy as np
from numpy.typing import ArrayLike

from megascale.config import Layout, MoeConfig, RunConfig, finalize, load_config, validate
from megascale.corpus.batches import (
    Cursor,
    GlobalBatch,
    GlobalBatches,
    shares,
    used_sources,
)
from megascale.corpus.check import missing_ends
from megascale.corpus.run_length import RunLength, begin_after, most_tokens, run_length
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo, describe_source
from megascale.errors import UserError
from megascale.model import counts
from megascale.optim import steplaw
from megascale.optim.schedule import joints, lr_at
from megascale.planner import (
    PLANNERS,
    CostModel,
    OffloadModel,
    Problem,
    StepPlan,
    find_planner,
    timeline,
)
from megascale.planner.gantt import LEGEND, text_gantt
from megascale.run.earlier_runs import unwatched, with_earlier
from megascale.run.growing import small_and_grown
from megascale.run.heldout_sets import foreseen
from megascale.run.replay import part_seen, with_replay_blend
from megascale.run.same_tokenizer import require_same_tokenizer, warn_if_tokenizers_differ
from megascale.run.start import (
    model_of_start,
    require_model,
    start_of,
    warn_if_rate_jumps,
    with_rate_of_start,
)
from megascale.run.warnings import warnings_of


def load_run(
    config_path: str | Path, overrides: Sequence[str] = ()
) -> tuple[RunConfig, dict[str, SourceInfo]]:
    """Read a config, look at its corpora, and finalize it.

    Raises UserError for everything that is wrong with either, among it a model vocabulary
    smaller than a corpus's, sources of different tokenizers, and such that would be read more than
    `data.max_epochs` times.
    """
    config = load_config(config_path, overrides)
    of_start = None
    if config.start.checkpoint is not None:
        start = start_of(config)
        of_start = model_of_start(replace(config, start=start))
        config = load_config(config_path, overrides, under={"model": of_start})
        config = replace(config, start=start)
    config = with_earlier(steplaw.resolve(with_rate_of_start(config)))
    sources = {
        name: part_seen(describe_source(one), one) for name, one in config.data.sources.items()
    }
    tokens = source_tokens(sources)
    new = {name: tokens[name] for name, one in config.data.sources.items() if not one.replay}
    largest = max((info.vocab_size for info in sources.values()), default=1)
    config = with_replay_blend(finalize(config, new, largest))
    find_planner(config.planner.name)
    _check_vocabulary(config, sources)
    require_same_tokenizer(config, sources)
    if of_start is not None:
        require_model(config, of_start)
    _check_epochs(config, tokens)
    if config.growth is not None:
        validate(small_and_grown(config)[1])
    return config, sources


def source_tokens(sources: Mapping[str, SourceInfo]) -> dict[str, int]:
    """Training tokens of each source."""
    return {name: info.train_tokens for name, info in sources.items()}


def _missing_ends(sources: Mapping[str, SourceInfo]) -> list[str]:
    problems = {name: missing_ends(info) for name, info in sources.items()}
    return [
        f"source '{name}': {problem}; eod_id may be another, or megascale data check says more"
        for name, problem in problems.items()
        if problem is not None
    ]


def _check_vocabulary(config: RunConfig, sources: Mapping[str, SourceInfo]) -> None:
    known, start = config.model.vocab_size or 0, config.start.checkpoint
    for name, info in sources.items():
        if info.vocab_size > known and start is not None:
            raise UserError(
                f"source '{name}' has a vocabulary of {info.vocab_size} ids, the model of "
                f"{start} knows {known}; prepare the source with its tokenizer, or give it rows "
                f"for the new ids: megascale grow {quote(start)} --operator resize --vocab "
                f"{info.vocab_size} --out DIR, then start from DIR"
            )
        if info.vocab_size > known:
            raise UserError(
                f"model.vocab_size = {known} is below the vocabulary of {info.vocab_size} of "
                f"source '{name}'; set model.vocab_size={info.vocab_size} or leave it out"
            )


def _check_epochs(config: RunConfig, tokens: Mapping[str, int]) -> None:
    limit = config.data.max_epochs
    if limit is None:
        return
    most = most_tokens(config.data, config.train.tokens)
    if config.growth is not None:  # where the small model stops, a piece may be begun
        small = most_tokens(config.data, config.growth.at_tokens)
        piece = config.data.context_tokens - 1
        most = {name: count + small[name] + piece for name, count in most.items()}
    for name, epochs in _epochs(config, most, tokens).items():
        if epochs > limit:
            earlier = config.data.sources[name].earlier
            before = ", with what earlier runs read," * (earlier is not None)
            raise UserError(
                f"source '{name}'{before} would be read up to {epochs:.4g} times, but "
                f"data.max_epochs = {limit}; set data.max_epochs={math.ceil(epochs)}, lower its "
                "share or train.tokens"
            )


def _epochs(
    config: RunConfig, read: Mapping[str, int], tokens: Mapping[str, int]
) -> dict[str, float]:
    """Passes over each source where so much of it is `read`, the runs behind this one included."""
    epochs = {}
    for name in used_sources(config.data.stages):
        source, count = config.data.sources[name], read.get(name, 0)
        if source.earlier is not None and not source.replay:
            count += source.earlier.tokens
        epochs[name] = count / max(1, tokens[name])
    return epochs


def cost_model(config: RunConfig) -> CostModel:
    """The cost model that steps of this run are planned with.

    Measured where `planner.cost` names a file (UserError where that cannot be used), else
    uncalibrated. The allgather dispatcher of experts pads every micro-batch to the full
    capacity, so there the part of the cost that grows with tokens is paid per micro-batch.
    """
    if config.planner.cost is not None:
        return _measured_cost(config.planner.cost)
    cost = counts.default_cost(config.model, config.parallel.tensor)
    if config.model.moe is None or config.model.moe.dispatcher != "allgather":
        return cost
    padded_s = cost.b * (config.planner.capacity_tokens or 0)
    return replace(cost, b=0.0, fixed=cost.fixed + padded_s)


@cache
def _measured_cost(path: str) -> CostModel:
    """Read once: a run plans all its steps with the same costs."""
    try:
        return CostModel.load(path)
    except UserError as error:
        raise UserError(f"planner.cost: {error}; megascale calibrate writes one") from None


def offload_model(config: RunConfig, layout: Layout) -> OffloadModel | None:
    """What offload saves and costs a rank of this run; None where the config allows none."""
    copy_bytes_per_s = config.planner.host_copy_bytes_per_s
    if copy_bytes_per_s is None:
        return None
    return OffloadModel(
        stage_layers=config.model.num_layers // layout.pipeline,
        bytes_per_token=counts.layer_activation_bytes(config, layout),
        copy_bytes_per_s=copy_bytes_per_s,
    )


def step_problem(config: RunConfig, layout: Layout, lengths: ArrayLike) -> Problem:
    """What a planner is given for a step of this run with sequences of `lengths` tokens."""
    capacity = config.planner.capacity_tokens
    assert capacity is not None, "the config is not finalized"
    return Problem.of(
        lengths,
        layout.hdp,
        capacity,
        layout.mode,
        cost_model(config),
        pipeline=layout.pipeline,
        expert_group=layout.expert,
        offload=offload_model(config, layout),
        budget_s=config.planner.budget_s,
    )


def plan_lengths(config: RunConfig, layout: Layout, lengths: ArrayLike) -> StepPlan:
    """Plan sequences of `lengths` tokens as a step of this run would."""
    return find_planner(config.planner.name)(step_problem(config, layout, lengths))


@dataclass(frozen=True)
class FirstStep:
    """The first step of a run and its plan."""

    batch: GlobalBatch
    plan: StepPlan


def first_step(config: RunConfig, layout: Layout, sources: Mapping[str, SourceInfo]) -> FirstStep:
    """Deal and plan step 0."""
    batch, _ = _batches(config, sources).next(Cursor())
    return FirstStep(batch, plan_lengths(config, layout, batch.length))


def _batches(config: RunConfig, sources: Mapping[str, SourceInfo]) -> GlobalBatches:
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    return GlobalBatches(config.data, shards, config.seed)


def expected_lengths(config: RunConfig, sources: Mapping[str, SourceInfo]) -> list[RunLength]:
    """How long a run will be; before it, where it grows, how long its small model's will be."""
    batches, tokens = _batches(config, sources), config.train.tokens
    if config.growth is None:
        return [run_length(batches, tokens, Cursor())]
    small = run_length(batches, config.growth.at_tokens, Cursor())
    return [small, run_length(batches, tokens, begin_after(small))]


def describe_run(
    config: RunConfig,
    layout: Layout,
    sources: Mapping[str, SourceInfo],
    first: FirstStep | None = None,
) -> str:
    """Everything that follows from a finalized config, as text of many lines.

    `first` saves dealing step 0 again where it is at hand.
    """
    first = first or first_step(config, layout, sources)
    has_heldout = {name: info.heldout is not None for name, info in sources.items()}
    lengths = expected_lengths(config, sources)
    read = sum((Counter(one.read) for one in lengths), Counter())
    epochs, length = _epochs(config, read, source_tokens(sources)), lengths[-1]
    warnings = warnings_of(config, layout, epochs, has_heldout, first.batch.num_sequences, length)
    warnings += warn_if_tokenizers_differ(config, sources)
    warnings += [*warn_if_rate_jumps(config), *unwatched(config)]
    warnings += _missing_ends(sources)
    sections = [
        _title(config, length),
        _model(config, first),
        _grown(config, layout, first),
        _layout(config, layout),
        _memory(config, layout),
        _data(config, sources, epochs),
        _learning_rate(config, first, length),
        _step(config, layout, first),
        _files(config),
        [f"warning: {warning}" for warning in warnings],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _title(config: RunConfig, length: RunLength) -> list[str]:
    steps = length.num_steps
    about = "about " * (length.end is None)
    lines = [
        f"run {config.run_dir}: {about}{steps:,} steps of {config.data.global_batch_tokens:,} "
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
    memory = counts.memory_per_rank(grown, layout)
    room = f"  memory per rank       {_bytes(memory.total)} on the fullest pipeline stage"
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
    axes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x HDP {layout.hdp}"
    return [
        f"layout                  {layout.world} ranks = {axes}",
        f"  experts over          {layout.expert} ranks",
        f"  mode                  {layout.mode}",
        f"  capacity              {config.planner.capacity_tokens:,} tokens per rank and "
        "micro-batch",
    ]


def _memory(config: RunConfig, layout: Layout) -> list[str]:
    memory = counts.memory_per_rank(config, layout)
    return [
        f"memory per rank         {_bytes(memory.total)} on the fullest pipeline stage",
        f"  weights               {_bytes(memory.weights)}",
        f"  gradients             {_bytes(memory.gradients)}",
        f"  optimizer             {_bytes(memory.optimizer)}",
        f"  activations           {_bytes(memory.activations)} (estimate)",
    ]


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
    for name, part in foreseen(config, sources):
        lines.append(f"  {f'held-out {name}':<21} {part}")
    begin = 0
    for index, stage in enumerate(config.data.stages):
        blend = ", ".join(f"{name} {float(share):.2%}" for name, share in shares(stage).items())
        lines.append(f"  stage {index:<15} from {begin:,} tokens: {blend}")
        begin += stage.tokens or 0
    return lines


def _learning_rate(config: RunConfig, first: FirstStep, length: RunLength) -> list[str]:
    lines = ["learning rate           (of the step that reaches these tokens)"]
    begin, end = first.batch.num_tokens, config.train.tokens
    points = dict(joints(config.optim.schedule))
    for tokens in (min(begin, end), end):
        points.setdefault(tokens, lr_at(tokens, config.optim.schedule))
    for tokens, lr in sorted(points.items()):
        if 0 < tokens <= end:
            step = length.step_reaching(tokens) - 1
            lines.append(f"  {tokens:>16,} tokens {lr:.4g} in step {step:,}")
    return lines


def _step(config: RunConfig, layout: Layout, first: FirstStep) -> list[str]:
    batch, plan, cost = first.batch, first.plan, cost_model(config)
    length, times = batch.length, timeline(plan, batch.length, cost)
    over = plan.predicted_s / plan.lower_bound_s
    how = f"{plan.predicted_s:.4g} s, calibrated cost" if cost.calibrated else "uncalibrated cost"
    return [
        f"step 0                  {batch.num_tokens:,} tokens in {batch.num_sequences:,} "
        f"sequences of {int(length.min()):,} to {int(length.max()):,} (median "
        f"{int(np.median(length)):,}), {len(plan.rings):,} micro-batches",
        f"  planned by            {config.planner.name} in {plan.plan_s * 1e3:.1f} ms, "
        f"{over:.3f} x the lower bound ({how})",
        f"  imbalance             {times.imbalance:.3f} (step time over mean busy time)",
        f"  {static_line(step_problem(config, layout, length), plan)}",
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


def _bytes(number: int) -> str:
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}"
