"""Marks of rings in pictures of a plan: an outline, and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from megascale.arrays import Floats
from megascale.planner.plan import StepPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTLINE = "#222222"
MOST_ROWS = 64
"""Ranks of a plan up to which rings have outlines and labels."""
LEAST_LABEL = 0.012
"""Part of the time axis that a ring must take for its size to be written into it."""


def mark_rings(axes: Axes, plan: StepPlan, begin: Floats, end: Floats, height: float) -> None:
    """Outline each ring of two ranks and more, and write its size into it.

    `begin` and `end` have a time for each ring of the plan, in units of the time axis, whose
    limits are set. Bars of a rank have the height `height`, of 1. A ring whose ranks are not
    consecutive has a mark for each run of them. Plans of more than 64 ranks get no marks.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    if plan.num_ranks > MOST_ROWS:
        return
    least = LEAST_LABEL * axes.get_xlim()[1]
    for start, stop, ring in zip(begin, end, plan.rings, strict=True):
        for first, count in consecutive(ring.ranks) if len(ring.ranks) > 1 else ():
            box = Rectangle((start, first - height / 2), stop - start, count - 1 + height)
            box.set(facecolor="none", edgecolor=OUTLINE, linewidth=1.6, zorder=3)
            axes.add_patch(box)
            if stop - start > least:
                where = ((start + stop) / 2, first + (count - 1) / 2)
                label = axes.annotate(str(len(ring.ranks)), where, ha="center", va="center")
                label.set(zorder=4, path_effects=[withStroke(linewidth=2.5, foreground="white")])


def consecutive(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of consecutive ranks of a ring."""
    numbered = enumerate(sorted(ranks))
    for _, members in groupby(numbered, key=lambda item: item[1] - item[0]):
        run = [rank for _, rank in members]
        yield run[0], len(run)
