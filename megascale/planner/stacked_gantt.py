"""One picture of several plans of the same batch, above one another on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from megascale.planner.cost import CostModel
from megascale.planner.plan import StepPlan
from megascale.planner.ring_marks import MOST_ROWS, OUTLINE, consecutive, mark_rings
from megascale.planner.timeline import timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IDLE = "#d4d4d4"
ALONE = "#fdd49e"
"""A micro-batch of one rank; those of rings are darker, the more ranks they have."""
END: Any = {"color": "#b2182b", "linestyle": "--", "linewidth": 1.6, "zorder": 5}
HEIGHT = 0.8


@dataclass(frozen=True)
class TitledPlan:
    """A plan, and what is written above it."""

    title: str
    plan: StepPlan


def plot_stacked(
    plans: Sequence[TitledPlan], lengths: ArrayLike, cost: CostModel, title: str, path: str | Path
) -> None:
    """Write the picture (format by the ending of `path`).

    Ranks are rows and micro-batches bars, at the times that `cost` predicts; a rank without work
    before the end of its step is grey. Rings of two ranks and more have an outline and their size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(one.plan.num_ranks for one in plans)
    height = len(plans) * min(6.0, 0.9 + 0.32 * rows) + 1.3
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12)
    panels = figure.subplots(len(plans), 1, sharex=True, squeeze=False)[:, 0]
    longest_s = max(one.plan.predicted_s for one in plans) or 1.0
    unit, label = _unit(longest_s, cost.calibrated)
    for axes, one in zip(panels, plans, strict=True):
        axes.set_xlim(0, longest_s * unit * 1.01)
        _draw(axes, one.plan, lengths, cost, unit)
        axes.set_title(one.title, loc="left", fontsize=11)
    panels[-1].set_xlabel(label)
    sizes = sorted({len(ring.ranks) for one in plans for ring in one.plan.rings})
    figure.legend(
        handles=_legend(sizes, rows),
        loc="outside lower center",
        ncols=len(sizes) + 2,
        frameon=False,
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _unit(longest_s: float, is_calibrated: bool) -> tuple[float, str]:
    """What seconds are multiplied with, and the label of the time axis."""
    if not is_calibrated:
        return 1 / longest_s, "predicted time (longest step = 1)"
    return (1.0, "predicted time (s)") if longest_s >= 1 else (1e3, "predicted time (ms)")


def _draw(axes: Axes, plan: StepPlan, lengths: ArrayLike, cost: CostModel, unit: float) -> None:
    times = timeline(plan, lengths, cost)
    axes.barh(range(plan.num_ranks), times.total_s * unit, height=HEIGHT, color=IDLE)
    begins, ends = times.begin_s * unit, times.end_s * unit
    for begin, end, ring in zip(begins, ends, plan.rings, strict=True):
        for first, count in consecutive(ring.ranks):
            axes.barh(
                first + (count - 1) / 2,
                end - begin,
                count - 1 + HEIGHT,
                begin,
                color=_colour(len(ring.ranks), plan.num_ranks),
                edgecolor="white",
                linewidth=float(plan.num_ranks <= MOST_ROWS),
                zorder=2,
            )
    mark_rings(axes, plan, begins, ends, HEIGHT)
    axes.axvline(times.total_s * unit, **END)
    axes.set_ylim(plan.num_ranks - 0.4, -0.6)
    if plan.num_ranks <= 8:
        axes.set_yticks(range(plan.num_ranks))
    axes.set_ylabel("rank")
    axes.spines[["top", "right"]].set_visible(False)


def _colour(size: int, num_ranks: int) -> Any:
    """From light to dark with the part of the ranks that share a micro-batch."""
    from matplotlib import colormaps

    if size == 1:
        return ALONE
    return colormaps["Blues"](0.25 + 0.35 * size / num_ranks)


def _legend(sizes: Sequence[int], num_ranks: int) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {size: f"ring of {size} ranks" if size > 1 else "one rank alone" for size in sizes}
    handles = [
        Patch(
            facecolor=_colour(size, num_ranks),
            edgecolor=OUTLINE if size > 1 else "white",
            label=name,
        )
        for size, name in names.items()
    ]
    idle, end = Patch(facecolor=IDLE, label="idle"), Line2D([], [], **END, label="end of the step")
    return [*handles, idle, end]
