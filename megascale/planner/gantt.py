"""Pictures of a plan: ranks as rows, time to the right, micro-batches as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Floats, Integers
from megascale.planner.cost import CostModel
from megascale.planner.plan import StepPlan
from megascale.planner.ring_marks import MOST_ROWS, consecutive, mark_rings
from megascale.planner.timeline import Timeline, timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TEXT_ROWS = 16
_MARKS = ((0.5, "#"), (0.125, "="), (0.0, "-"))
_PADDING_COLOUR = (0.87, 0.87, 0.87, 1.0)
_BOUND_COLOUR = "#b2182b"
HEIGHT = 0.82
"""Of the bar of a rank, of 1."""
COLOURED_TOKENS = 4**4, 4**9
"""Lengths of the first and the last colour; shorter and longer sequences have these two."""
LEGEND = "longest sequence > 1/2 of capacity '#', > 1/8 '=', shorter '-', padding '.'"


def text_gantt(plan: StepPlan, lengths: ArrayLike, cost: CostModel, width: int = 72) -> str:
    """One pipeline stage of the plan as text, `width` columns for the longer of its time and the
    lower bound of the step.

    At most 16 ranks are shown, evenly from the busiest to the least busy. A `|` after the bars
    marks the lower bound.
    """
    times = timeline(plan, lengths, cost)
    scale = width / (max(times.total_s, plan.lower_bound_s) or 1.0)
    ranks = _shown_ranks(times, plan.num_ranks)
    longest = _longest_tokens(plan, lengths)
    row_cells = {rank: [" "] * (width + 1) for rank in ranks}
    for position, ring in enumerate(plan.rings):
        for rank in row_cells.keys() & ring.ranks:
            begin = round(times.begin_s[position] * scale)
            end = max(begin + 1, round(times.end_s[position] * scale))
            row_cells[rank][begin:end] = _bar(end - begin, longest[position] / plan.capacity)
    counts, bound, rows = plan.counts(), min(width, round(plan.lower_bound_s * scale)), []
    for rank, cells in row_cells.items():
        cells[bound] = "|" if cells[bound] == " " else cells[bound]
        busy = times.busy_s[rank] / (times.total_s or 1.0)
        bars = "".join(cells[: width + 1])
        rows.append(f"rank {rank:>5} {bars} {busy:4.0%} {counts[rank]:>3} mb")
    if len(ranks) < plan.num_ranks:
        rows.append(f"({len(ranks)} of {plan.num_ranks} ranks, busiest first)")
    return "\n".join(rows)


def _bar(width: int, fullness: float) -> list[str]:
    mark = next((mark for limit, mark in _MARKS if fullness > limit), ".")
    return ["["] + [mark] * (width - 1) if width > 1 else [mark]


def _shown_ranks(times: Timeline, num_ranks: int) -> Sequence[int]:
    if num_ranks <= MAX_TEXT_ROWS:
        return range(num_ranks)
    by_busy = np.argsort(-times.busy_s, kind="stable")
    chosen: list[int] = by_busy[np.linspace(0, num_ranks - 1, MAX_TEXT_ROWS).astype(int)].tolist()
    return chosen


def _longest_tokens(plan: StepPlan, lengths: ArrayLike) -> Integers:
    """Tokens of the longest sequence of each ring; 0 for padding."""
    tokens = np.asarray(lengths, dtype=np.int64)
    longest = [max((int(tokens[i]) for i in ring.sequences), default=0) for ring in plan.rings]
    return np.array(longest, dtype=np.int64)


def plot_gantt(
    plan: StepPlan, lengths: ArrayLike, cost: CostModel, path: str | Path, corpus: str = ""
) -> None:
    """Write one pipeline stage of the plan as a picture (format by the ending of `path`).

    Bars are coloured by their longest sequence, in every picture alike. Rings of two ranks and
    more have an outline and their size. Dashed, the lower bound of the step. Times of an
    uncalibrated cost model are shown in units of the lower bound.
    `corpus` is what the title says of the origin of the sequences.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times = timeline(plan, lengths, cost)
    unit, label = 1 / (plan.lower_bound_s or 1.0), "time / lower bound"
    if cost.calibrated:
        is_long = times.total_s >= 1
        unit, label = (1.0, "predicted time (s)") if is_long else (1e3, "predicted time (ms)")
    figure = Figure(figsize=(10, min(12.0, 2.4 + 0.32 * plan.num_ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_bars(axes, plan, _longest_tokens(plan, lengths), times, unit)
    bound = plan.lower_bound_s * unit
    axes.axvline(bound, color=_BOUND_COLOUR, linestyle="--", linewidth=1.4, zorder=5)
    above = axes.get_xaxis_transform()
    mark = axes.text(bound, 1.005, "lower bound", ha="right", va="bottom", transform=above)
    mark.set(color=_BOUND_COLOUR, fontsize=9)
    axes.set_xlabel(label)
    axes.set_title(_title(plan, lengths, corpus), loc="left", fontsize=11, pad=18)
    figure.savefig(path, dpi=150)


def _title(plan: StepPlan, lengths: ArrayLike, corpus: str) -> str:
    tokens = np.asarray(lengths, dtype=np.int64)
    over = plan.predicted_s / plan.lower_bound_s if plan.lower_bound_s > 0 else 1.0
    above = f"One step of {corpus}\n" if corpus else ""
    return (
        f"{above}{len(tokens):,} sequences, {int(tokens.sum()):,} tokens on {plan.num_ranks:,} "
        f"ranks ({plan.mode}): {over:.3f}x the lower bound"
    )


def _draw_bars(axes: Axes, plan: StepPlan, longest: Integers, times: Timeline, unit: float) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    scale = ScalarMappable(LogNorm(*COLOURED_TOKENS), colormaps["viridis"])
    colours = scale.to_rgba(np.clip(longest, *COLOURED_TOKENS))
    colours[longest == 0] = _PADDING_COLOUR
    bars = [(i, *run) for i, ring in enumerate(plan.rings) for run in consecutive(ring.ranks)]
    positions, first, count = np.array(bars).T
    is_small = plan.num_ranks <= MOST_ROWS  # beyond, gaps between bars would make a pattern
    begin, end = times.begin_s * unit, times.end_s * unit
    half = HEIGHT / 2 * (1.0 if is_small else 1.3)
    corners = _corners(begin[positions], end[positions], first - half, first + count - 1 + half)
    axes.add_collection(
        PolyCollection(
            cast(Any, corners),  # one array is taken as it is, and a list copied bar by bar
            facecolors=colours[positions],
            edgecolors="white",
            linewidths=0.6 if is_small else 0.0,
            antialiaseds=is_small,
        )
    )
    axes.set_ylim(plan.num_ranks - 0.4, -0.6)
    axes.set_xlim(0, max(times.total_s, plan.lower_bound_s) * unit * 1.02 or 1.0)
    mark_rings(axes, plan, begin, end, HEIGHT)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("rank")
    axes.spines[["top", "right"]].set_visible(False)
    ticks = [4**power for power in range(4, 10)]
    bar = axes.figure.colorbar(
        scale, ax=axes, pad=0.01, ticks=ticks, format="{x:,.0f}", extend="both"
    )
    bar.minorticks_off()
    bar.set_label("longest sequence (tokens)")


def _corners(begin: Floats, end: Floats, top: Floats, bottom: Floats) -> Floats:
    """Corners of bars, [bars, 4, 2]."""
    x = np.stack([begin, end, end, begin], axis=1)
    return np.stack([x, np.stack([top, top, bottom, bottom], axis=1)], axis=2)
