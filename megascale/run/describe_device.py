"""The sections of `megascale plan --device`: does it fit, how long does it take, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megascale.config import Layout, RunConfig
from megascale.devices.memory import StageMemory, most_tokens, stage_memories
from megascale.devices.rates import COMPUTE_EFFICIENCY, KNOWN_ERRORS, LINK_EFFICIENCY
from megascale.devices.table import GIB
from megascale.run.on_device import (
    Figures,
    NamedDevice,
    changes_that_fit,
    figures,
    static_figures,
)
from megascale.run.step_problem import FirstStep

PARTS = {
    "attention_s": "attention",
    "linear_s": "linear",
    "exchange_s": "tensor and experts",
    "launch_s": "launches",
    "ring_s": "ring traffic",
    "reduction_s": "gradient reduction",
    "fill_s": "pipeline fill",
    "imbalance_s": "imbalance",
}
"""What the fields of `StepTime` are called here."""


def describe_device(
    config: RunConfig, layout: Layout, first: FirstStep, on: NamedDevice, tokens: int
) -> list[list[str]]:
    """Sections on memory and time, for a run of so many `tokens` whose steps are like `first`."""
    return [
        _device(layout, on),
        _memory(config, layout, first, on),
        _time(config, layout, first, on, tokens),
    ]


def _device(layout: Layout, on: NamedDevice) -> list[str]:
    name, device = on
    rates = (
        f"{device.bf16_flops_per_s / 1e12:g} TFLOP/s in bf16, {device.fp32_flops_per_s / 1e12:g} "
        f"in fp32, {_gib(device.memory_bytes)}"
    )
    links = (
        f"{device.intra_bytes_per_s / 1e9:g} GB/s in a node of {device.node_size}, "
        f"{device.inter_bytes_per_s / 1e9:g} between nodes, {device.host_bytes_per_s / 1e9:g} to "
        "the host"
    )
    return [
        f"{'device':<24}{layout.world:,} x {name}: {rates}",
        f"  {'links':<22}{links}",
        f"  {'source':<22}{device.source}",
    ]


def _memory(config: RunConfig, layout: Layout, first: FirstStep, on: NamedDevice) -> list[str]:
    name, device = on
    stages = stage_memories(config, layout, device)
    worst = max(stages, key=lambda one: one.total)
    has_room = worst.total <= device.memory_bytes
    verdict = "fits" if has_room else "does not fit"
    lines = [
        f"{f'memory on {name}':<24}{verdict}: {_gib(worst.total)} of {_gib(device.memory_bytes)} "
        "on the fullest stage"
    ]
    for stage, needed in enumerate(stages):
        state = "fits" if needed.total <= device.memory_bytes else "does not fit"
        lines.append(f"  {f'stage {stage}':<22}{_gib(needed.total)}, {state}: {_parts(needed)}")
    lines.append(
        f"  {'allowance':<22}{_gib(worst.allowance)} of it, assumed: context "
        f"{_gib(worst.context)}, communicators {_gib(worst.messages)}, fragmentation "
        f"{_gib(worst.fragmentation)}"
    )
    if not has_room:
        return [*lines, *_changes(config, layout, first, on)]
    most = most_tokens(config, layout, device)
    return [*lines, f"  {'largest capacity':<22}{most:,} tokens would fit"]


def _parts(stage: StageMemory) -> str:
    counted = stage.counted
    parts = {
        "weights": counted.weights,
        "gradients": counted.gradients,
        "optimizer": counted.optimizer,
        "activations": counted.activations,
        "buffers of rings": counted.rings,
        "allowance": stage.allowance,
    }
    return ", ".join(f"{name} {_gib(number)}" for name, number in parts.items() if number)


def _changes(config: RunConfig, layout: Layout, first: FirstStep, on: NamedDevice) -> Iterator[str]:
    changes = changes_that_fit(config, layout, on.device, first.problem.lengths)
    if not changes:
        yield (
            f"  {'changes that fit':<22}none found among capacity, offload, recomputation, tensor "
            "and more ranks; raise parallel.pipeline"
        )
    for index, change in enumerate(changes):
        label = "" if index else "changes that fit"
        yield (
            f"  {label:<22}{change.words}: {_gib(change.needed)}, "
            f"{_seconds(change.figures.time.total_s)} per step on {change.figures.world:,} devices"
        )


def _time(
    config: RunConfig, layout: Layout, first: FirstStep, on: NamedDevice, tokens: int
) -> list[str]:
    name, device = on
    mine = figures(config, layout, device, first.plan, first.problem)
    static = static_figures(config, layout, device, first.problem.lengths)
    columns = [mine] if isinstance(static, str) else [mine, static]
    lines = [
        f"{f'time on {name}':<24}{_basis(config)}",
        *_known_error(config, name),
        _row("", [config.planner.name, "static_best"][: len(columns)]),
    ]
    lines += [_row(label, values) for label, values in _rows(columns, tokens)]
    lines.append("  where the time of a step goes")
    for field in fields(mine.time):
        shares = [getattr(one.time, field.name) / one.time.total_s for one in columns]
        lines.append(_row(PARTS[field.name], [_percent(share) for share in shares]))
    if isinstance(static, str):
        return [*lines, f"  {'static_best':<22}cannot run this: {static}"]
    gain = static.time.total_s / mine.time.total_s
    return [*lines, f"  {'gain on these lengths':<22}{gain:.2f} x the speed of static_best"]


def _basis(config: RunConfig) -> str:
    links = f"{LINK_EFFICIENCY:.0%} of the links' rates"
    if config.planner.cost is not None:
        return (
            f"micro-batches as measured ({config.planner.cost}); gradient reduction is an "
            f"estimate, at {links}"
        )
    return (
        f"estimate, not calibrated: {COMPUTE_EFFICIENCY:.0%} of peak FLOP/s and {links} are assumed"
    )


def _known_error(config: RunConfig, name: str) -> list[str]:
    """How far the estimate was from published step times, where there are any."""
    if config.planner.cost is not None or config.train.precision != "bf16":
        return []
    known = KNOWN_ERRORS.get((name, config.model.moe is not None))
    if known is None:
        return []
    errors = f"{known.least:+.0%}" + f" to {known.most:+.0%}" * (known.most > known.least)
    return [f"  {'error':<22}{errors} against published steps of {known.runs}"]


def _rows(columns: list[Figures], tokens: int) -> Iterator[tuple[str, list[str]]]:
    yield "step", [_seconds(one.time.total_s) for one in columns]
    yield "tokens/s", [f"{one.tokens_per_s:,.0f}" for one in columns]
    yield "MFU", [f"{one.mfu:.1%}" for one in columns]
    yield f"days to {tokens:,}", [f"{one.days(tokens):,.2f}" for one in columns]
    yield "device-hours", [f"{one.device_hours(tokens):,.0f}" for one in columns]


def _row(label: str, values: list[str]) -> str:
    return f"  {label:<28}" + "".join(f"{value:>16}" for value in values)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def _percent(share: float) -> str:
    """With one digit. Parts are differences, so one may be a rounding error below 0."""
    return f"{round(share, 3) + 0.0:.1%}"  # -0.0 + 0.0 is 0.0


def _gib(number: int) -> str:
    return f"{number / GIB:.1f} GiB"
