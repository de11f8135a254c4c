"""Which ranks are slow for the work they were given.

Shape suffixes: R ranks, M timed micro-batches of a rank (NaN where there were fewer).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.arrays import Floats
from megascale.monitor.lines import LineFile
from megascale.monitor.metrics import read_rows, rewind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANKS_FILE = "ranks.jsonl"
SLOW = 1.04
"""A rank that takes this much longer than others for the same work ..."""
IN_A_ROW = 5
"""... in so many comparisons in a row is a straggler."""


def slowdown_R(timed_RM3: Floats) -> Floats:
    """Each rank's time over that of the middle rank (the faster one of two) for the same work.

    `timed_RM3` are calls, tokens and seconds of micro-batches. What a micro-batch should take is
    fitted to all of them as `fixed * calls + each * tokens`, so a rank that was given more is not
    slow. A rank's value is the median of its micro-batches; NaN where it had none.
    """
    known = timed_RM3[np.isfinite(timed_RM3[..., 2])]
    if not len(known):
        return np.full(len(timed_RM3), np.nan)
    # relative errors: a long micro-batch must not outweigh the short ones
    work, seconds = known[:, :2] / known[:, 2:], np.ones(len(known))
    fit, *_ = np.linalg.lstsq(work, seconds, rcond=None)
    expected_RM = timed_RM3[..., :2] @ fit
    with np.errstate(invalid="ignore", divide="ignore"):
        over_RM = timed_RM3[..., 2] / expected_RM
    over_R = np.array([np.median(one[np.isfinite(one)]) if np.isfinite(one).any() else np.nan
                       for one in over_RM])  # fmt: skip
    relative_R: Floats = over_R / median_low(over_R[np.isfinite(over_R)].tolist())
    return relative_R


class StragglerWatch:
    """Notices ranks that stay slow."""

    def __init__(self, num_ranks: int) -> None:
        self._in_a_row_R = np.zeros(num_ranks, dtype=np.int64)

    def see(self, over_R: Floats) -> list[int]:
        """Take a comparison; the ranks that have just become stragglers."""
        slow_R = np.nan_to_num(over_R, nan=1.0) > SLOW
        self._in_a_row_R = np.where(slow_R, self._in_a_row_R + 1, 0)
        return [int(rank) for rank in np.flatnonzero(self._in_a_row_R == IN_A_ROW)]


class RankLog:
    """Writes `ranks.jsonl`; on resume after step `resume_step` later rows are dropped."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        rewind(run_dir / RANKS_FILE, resume_step)
        self._lines = LineFile(run_dir / RANKS_FILE)

    def write(self, step: int, over_R: Floats) -> None:
        """Add a row: how slow each rank was; null where that is not known."""
        shown = [None if np.isnan(one) else round(float(one), 3) for one in over_R]
        self._lines.write(json.dumps({"step": step, "slowdown": shown}))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_slowdowns(run_dir: Path) -> tuple[list[int], Floats]:
    """(steps, slowdown by row and rank) of a run; rows of another number of ranks than the last
    are left out. Empty where there are none."""
    path = run_dir / RANKS_FILE
    rows = read_rows(path) if path.exists() else []
    rows = [row for row in rows if _is_slowdown(row.get("slowdown"))]
    rows = [row for row in rows if len(row["slowdown"]) == len(rows[-1]["slowdown"])]
    values = [[np.nan if one is None else one for one in row["slowdown"]] for row in rows]
    return [row["step"] for row in rows], np.array(values, dtype=np.float64)


def _is_slowdown(values: Any) -> bool:
    """Whether they are numbers or None, one at least."""
    numbers = isinstance(values, list) and all(isinstance(v, int | float | None) for v in values)
    return numbers and bool(values)


def plot_ranks(steps: Sequence[int], over: Floats, title: str, path: Path) -> None:
    """Heat map of ranks over steps: how slow each rank was for its work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 1.8 + 0.12 * min(48, max(8, over.shape[1]))), dpi=130)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_subplot()
    extent = (float(steps[0]), float(steps[-1] + 1), over.shape[1] - 0.5, -0.5)
    image = axes.imshow(
        over.T, cmap="RdBu_r", vmin=0.8, vmax=1.2, aspect="auto", extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="rank")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    bar = figure.colorbar(image, extend="both")
    bar.set_label("time over the middle\nrank's, same work", fontsize=8)
    figure.savefig(path)
