"""What a reader wants to know first of a run: what it is, where it runs, how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megascale.config import DataConfig, ModelConfig, RunConfig
from megascale.model.counts import count_parameters
from megascale.monitor.metric_fields import field_called
from megascale.monitor.quantities import show_count, show_names
from megascale.monitor.run_figures import HeldOut, Speedup
from megascale.monitor.story import Story
from megascale.run.ancestry import forebears
from megascale.run.origin import home_of

LAYOUT = {"tensor": "tensor", "pipeline": "pipeline", "hdp": "HDP"}
"""Axes of ranks, as the event of a start names them, and as people do."""
HELDOUT_TITLES = (
    "held-out set", "loss", "first loss", "bits per byte", "first bits per byte", "tokens scored",
    "step",
)  # fmt: skip
"""Of the table of held-out scores."""


def what_it_is(run_dir: Path, story: Story) -> Iterator[tuple[str, str]]:
    """(title, text): model, data, layout, device, lineage, code; what is not known is left out."""
    if story.config is not None:
        yield from _of_config(story.config)
    starts = [event for event in story.events if event["event"] == "start"]
    if starts:
        yield from _of_start(starts[-1])
    lineage = "; ".join(_lineage(run_dir))
    if lineage:
        yield "lineage", lineage


def how_far_it_is(story: Story, speedup: Speedup | None) -> Iterator[tuple[str, str]]:
    """(title, text): tokens, loss and speed of the last step, and what its plans gain."""
    last = story.last
    if last:
        for title, name in (("tokens", "tokens_seen"), ("loss", "loss"), ("speed", "tokens_per_s")):
            value = last[name]
            yield title, "not finite" if value is None else field_called(name).in_words(value)
    if speedup is not None:
        yield "plan speed-up", show_speedup(speedup)


def show_speedup(speedup: Speedup) -> str:
    """A speed-up of plans in words."""
    return (
        f"{speedup.median:.2f}x over static context parallelism, predicted: the median of "
        f"{speedup.steps:,} steps, from {speedup.least:.2f}x to {speedup.most:.2f}x"
    )


def heldout_row(one: HeldOut) -> tuple[str, ...]:
    """The cells of HELDOUT_TITLES."""
    scored, whole = one.last.get("tokens"), one.last.get("set_tokens")
    tokens = f"{scored:,}" if isinstance(scored, int) else ""
    tokens += f" of {whole:,}" if tokens and isinstance(whole, int) else ""
    cells = [_score(which, name) for name in ("loss", "bits_per_byte") for which in _both(one)]
    return (one.source, *cells, tokens, f"{one.step:,}")


def _both(one: HeldOut) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return one.last, one.first


def _score(score: Mapping[str, Any], name: str) -> str:
    value = score.get(name)
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _of_config(config: RunConfig) -> Iterator[tuple[str, str]]:
    if _is_complete(config.model):
        yield "model", _model(config.model, config.parallel.tensor)
    data = config.data
    yield (
        "data",
        f"{show_names(list(data.sources))}; context {data.context_tokens:,}, "
        f"{step_sizes(data)} tokens a step",
    )


def step_sizes(data: DataConfig) -> str:
    """The nominal tokens of steps, in words."""
    whole, ramp = data.global_batch_tokens, data.batch_ramp
    if ramp is None:
        return f"{whole:,}"
    return f"{ramp.start_tokens:,} to {whole:,} (after {ramp.over_tokens:,})"


def _is_complete(model: ModelConfig) -> bool:
    """Whether the sizes are known that a run derives before it starts."""
    sizes = [model.vocab_size, model.ffn_hidden_size, model.num_kv_heads, model.head_dim]
    if model.moe is not None:
        sizes.append(model.moe.ffn_hidden_size)
    return None not in sizes


def _model(model: ModelConfig, tensor: int) -> str:
    sizes = count_parameters(model, tensor)
    active = f", {show_count(sizes.active)} active per token" if model.moe is not None else ""
    return (
        f"{show_count(sizes.total)} parameters ({show_count(sizes.non_embedding)} without "
        f"embeddings{active}): {model.num_layers} layers of {model.hidden_size:,}"
    )


def _of_start(start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the event of a start says; those of earlier versions say less."""
    layout = start.get("layout")
    if isinstance(layout, dict) and layout.keys() >= LAYOUT.keys():
        axes = " x ".join(f"{name} {layout[axis]}" for axis, name in LAYOUT.items())
        text = f"{start.get('world')} ranks = {axes}"
        experts = layout.get("expert", 1)
        text += f", experts over {experts} ranks" if experts != 1 else ""
        yield "layout", ", ".join(filter(None, (text, _text(start, "precision"))))
    device, nodes = _text(start, "device"), start.get("nodes")
    if device:
        where = f" on {nodes} nodes" if isinstance(nodes, int) and nodes > 1 else ""
        yield "device", f"{start.get('world')} x {device}{where}"
    versions = start.get("versions")
    if isinstance(versions, dict):
        yield "code", ", ".join(f"{name} {version}" for name, version in versions.items())


def _text(event: Mapping[str, Any], name: str) -> str:
    value = event.get(name)
    return value if isinstance(value, str) else ""


def _lineage(run_dir: Path) -> Iterator[str]:
    """The checkpoints that a run comes from, its parents first."""
    for folder, origin in forebears(run_dir):
        parents = " and ".join(
            f"step {one.step:,} of {home_of(one.checkpoint).name} ({show_count(one.tokens_seen)} "
            "tokens)"
            for one in origin.parents
        )
        child = f"{folder.name} " if folder.resolve() != run_dir.resolve() else ""
        yield f"{child}from {parents}, by {origin.made_by}"
