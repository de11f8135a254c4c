"""A picture of a run before it starts: the learning rate over tokens, and what is read under it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megascale.arrays import Floats
from megascale.config import GrowthConfig, RunConfig, SegmentConfig, StageConfig
from megascale.corpus.batches import shares, used_sources
from megascale.monitor.plot_style import COLOURS, STYLE, count_units, short_rate
from megascale.optim.schedule import joints, lr_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES = 2000
CURVE_COLOUR = COLOURS[0]
BANDS = ("#92c5de", "#f4a582", "#a6d8c4", "#c2a5cf", "#fdd49e", "#bababa", "#f1b6da", "#b8e0dc")
INK = "#303030"
LABEL_WIDTH = 0.15
"""Of a label of a joint, as part of the picture."""
LEAST_SHARE, LEAST_WIDTH = 0.1, 0.04
"""Parts of the picture below which a band or a stage is too small to write into."""


def plot_schedule(config: RunConfig, stages: Sequence[StageConfig], title: str, path: Path) -> None:
    """Draw the learning rate of a finalized config over its tokens into `path`, as PNG.

    Joints are marked with their rates. Under it the shares of `stages`, which may be empty where
    they are not known. A run that grows shows its small model's part before its own. Raises
    OSError where `path` cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 2 if stages else 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 2.4 + 1.9 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        heights = [2.6, 1.0][:rows]
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        spans = parts(config)
        for begin, end in spans:
            _draw_rate(panels[0], config.optim.schedule, begin, end, whole=spans[-1][1])
        if config.growth is not None:
            _mark_growth(panels[0], config.growth, spans[0][1])
        panels[0].set_ylim(0, 1.16 * (panels[0].dataLim.y1 or 1.0))
        panels[0].set_title(title)
        if stages:
            for begin, end in spans:
                _draw_stages(panels[1], stages, begin, end, whole=spans[-1][1])
            _name_sources(panels[1], stages)
            figure.legend(loc="outside lower center", ncols=6)
            figure.align_ylabels()
        _label_tokens(panels[-1], spans[-1][1])
        figure.savefig(path, format="png")


def parts(config: RunConfig) -> list[tuple[int, int]]:
    """Begin and end of the small model's part of a run that grows, and of the run proper.

    Each follows the schedule and reads the stages from the beginning.
    """
    if config.growth is None:
        return [(0, config.train.tokens)]
    begin = config.growth.at_tokens
    return [(0, begin), (begin, begin + config.train.tokens)]


def sampled_tokens(segments: Sequence[SegmentConfig], tokens: int) -> Floats:
    """Tokens at which the curve is drawn: evenly, and at both sides of every joint."""
    ends = [end + after for end, _ in joints(segments) for after in (0, 1) if end + after <= tokens]
    return np.unique(np.concatenate([np.linspace(0, tokens, SAMPLES).round(), ends, [tokens]]))


def stage_spans(stages: Sequence[StageConfig], tokens: int) -> list[tuple[int, int, StageConfig]]:
    """Begin, end and stage for each that begins within `tokens`; the last goes on to the end."""
    spans, begin = [], 0
    for index, stage in enumerate(stages):
        is_last = index == len(stages) - 1
        end = tokens if is_last else min(tokens, begin + (stage.tokens or 0))
        if begin < end:
            spans.append((begin, end, stage))
        begin = end
    return spans


def _draw_rate(
    axes: Axes, segments: Sequence[SegmentConfig], begin: int, end: int, whole: int
) -> None:
    """One part of a run, from `begin` to `end` of its `whole` tokens."""
    tokens = end - begin
    seen = sampled_tokens(segments, tokens)
    rates = np.array([lr_at(int(one), segments) for one in seen])
    axes.plot(begin + seen, rates, color=CURVE_COLOUR, linewidth=2.2)
    axes.fill_between(begin + seen, rates, color=CURVE_COLOUR, alpha=0.08, linewidth=0)
    units = count_units()
    labelled = -whole
    for joint, lr in joints(segments):
        if 0 < joint < tokens:
            rises = lr_at(joint + tokens // 50, segments) > lr  # and would cross a label above
            label = ""
            if LABEL_WIDTH * whole < joint - labelled and joint > 1:
                label, labelled = f"{short_rate(lr)} at {units.format_data(begin + joint)}", joint
            _mark(axes, begin + joint, lr, label, (14, -3) if rises else (3, 8))
    end_lr = lr_at(tokens, segments)
    beside = (8, -3) if end == whole else (-46, -14)
    _mark(axes, end, end_lr, short_rate(end_lr), beside)
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.grid(axis="x", visible=False)


def _mark_growth(axes: Axes, growth: GrowthConfig, tokens: int) -> None:
    axes.axvline(tokens, color=INK, linewidth=1.2)
    label = f"{growth.operator} x {growth.factor}"
    place = (tokens, 0.04)
    axes.annotate(
        label,
        place,
        xycoords=("data", "axes fraction"),
        xytext=(6, 0),
        textcoords="offset points",
        fontsize=9.5,
        color=INK,
    )


def _mark(axes: Axes, tokens: int, lr: float, label: str, offset: tuple[int, int]) -> None:
    """A point of the curve, its place on the axis, and a label `offset` points away from it."""
    axes.plot([tokens, tokens], [0, lr], color="#9a9a9a", linewidth=0.9, linestyle=(0, (3, 3)))
    axes.plot(
        tokens, lr, "o", color=CURVE_COLOUR, markeredgecolor="white", markersize=7, clip_on=False
    )
    axes.annotate(
        label, (tokens, lr), xytext=offset, textcoords="offset points", fontsize=9.5, color=INK
    )


def _draw_stages(
    axes: Axes, stages: Sequence[StageConfig], begin: int, end: int, whole: int
) -> None:
    """A band for each source, stacked in the order in which sources appear."""
    names = used_sources(stages)
    for first, last, stage in stage_spans(stages, end - begin):
        shown, floor, left, width = shares(stage), 0.0, begin + first, last - first
        for name in (name for name in names if name in shown):
            height = float(shown[name])
            colour = BANDS[names.index(name) % len(BANDS)]
            axes.bar(left, height, width, floor, align="edge", color=colour, linewidth=0)
            if height >= LEAST_SHARE and width >= LEAST_WIDTH * whole:
                place = (left + width / 2, floor + height / 2 - 0.01)
                axes.text(*place, f"{height:.0%}", ha="center", va="center", fontsize=9, color=INK)
            floor += height
        if left:
            axes.axvline(left, color="white", linewidth=1.6)


def _name_sources(axes: Axes, stages: Sequence[StageConfig]) -> None:
    for index, name in enumerate(used_sources(stages)):
        axes.bar(0, 0, color=BANDS[index % len(BANDS)], label=name)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    axes.set_ylabel("share of tokens")
    axes.grid(visible=False)


def _label_tokens(axes: Axes, tokens: int) -> None:
    axes.set_xlim(0, tokens)
    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(count_units())
    axes.tick_params(length=3)
