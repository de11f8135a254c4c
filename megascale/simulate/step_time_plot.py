"""A picture of a simulation: where the time of a step goes, by planner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_rows(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw where each planner's step time goes into `path` (format by its ending)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if "problem" not in row]
    names = [row["planner"] for row in shown]
    step_s = np.array([row["step_s"] for row in shown])
    idle_s = step_s * [row["idle_share"] for row in shown]
    passing_s = step_s * [row["passing_share"] for row in shown]
    figure = Figure(figsize=(9, 1.9 + 0.5 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = np.zeros(len(shown))
    parts = (
        ("computing", step_s - idle_s - passing_s, "#2166ac"),
        ("waiting for keys and values", passing_s, "#e08214"),
        ("waiting for other ranks", idle_s, "#c9c9c9"),
    )
    for label, width, colour in parts:
        axes.barh(names, width, left=left, label=label, color=colour, height=0.62)
        left += width
    for position, row in enumerate(shown):
        text = "" if row["speedup"] is None else f" {row['speedup']:.2f}x"
        axes.text(step_s[position], position, text, va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * step_s.max())
    axes.set_xlabel("seconds per step, mean over ranks; at the end of a bar: speed over static")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
