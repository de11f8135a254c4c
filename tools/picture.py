"""The picture of the front page: `python tools/picture.py [OUT.png]`.

One batch under the best static plan and under `hybrid`, on one time axis. Static context
parallelism gets the ring size and packing that are best for this batch with hindsight. Times are
those of the cost model of a 7B model at an assumed speed: on paper, nothing is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from megascale.model.counts import default_cost
from megascale.planner import PLANNERS, Problem, StepPlan, timeline
from megascale.simulate.cluster import MODELS
from megascale.simulate.lengths import draw_lengths

RANKS, CAPACITY, CONTEXT, TOKENS = 32, 8 * 2**10, 256 * 2**10, 2 * 2**20
TITLES = {"static_best": "static context parallelism", "hybrid": "hybrid (megascale)"}
OUT = Path(__file__).parents[1] / "configs" / "results" / "static_hybrid.png"


def main(words: list[str]) -> int:
    """Draw the picture, and print the ratio of the step times."""
    problem = front_page_batch()
    plans = {name: PLANNERS[name](problem) for name in TITLES}
    draw(problem, plans, Path(words[0]) if words else OUT)
    print(f"{len(problem.lengths)} sequences of {problem.lengths.sum():,} tokens on {RANKS} ranks")
    print(f"static / hybrid: {step_ratio(plans):.2f}x (cost model of a 7B model)")
    return 0


def front_page_batch() -> Problem:
    """2M tokens of GitHub-like lengths on 32 ranks, cut at 256K tokens."""
    lengths = draw_lengths("github", TOKENS, CONTEXT, seed=0)
    return Problem.of(lengths, RANKS, CAPACITY, "free", default_cost(MODELS["7b"].model))


def step_ratio(plans: dict[str, StepPlan]) -> float:
    """Step time of the static plan over that of `hybrid`, by the cost model."""
    return plans["static_best"].predicted_s / plans["hybrid"].predicted_s


def draw(problem: Problem, plans: dict[str, StepPlan], path: Path) -> None:
    """Ranks as rows, time to the right, micro-batches as bars coloured by their ring size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    shortest_s = plans["hybrid"].predicted_s
    columns = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (name, plan) in zip(columns, plans.items(), strict=True):
        bars = _draw_bars(axes, problem, plan, shortest_s)
        axes.axvline(plan.predicted_s / shortest_s, color="#b2182b", linestyle="--")
        time = plan.predicted_s / shortest_s
        axes.set_title(f"{TITLES[name]}: {time:.2f}", loc="left", fontsize=11)
        axes.set_xlabel("time of the step (hybrid = 1)")
        axes.spines[["top", "right"]].set_visible(False)
    columns[0].set(ylabel="rank", ylim=(RANKS - 0.4, -0.6))
    ticks = 2.0 ** np.arange(6)
    bar = figure.colorbar(bars, ax=columns, pad=0.01, ticks=ticks, format="{x:.0f}")
    bar.minorticks_off()
    bar.set_label("ranks that share the micro-batch")
    figure.savefig(path, dpi=110)


def _draw_bars(axes: Any, problem: Problem, plan: StepPlan, unit_s: float) -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    scale = ScalarMappable(LogNorm(1, RANKS), colormaps["viridis_r"])
    times = timeline(plan, problem.lengths, problem.cost)
    for begin, end, ring in zip(times.begin_s, times.end_s, plan.rings, strict=True):
        if ring.sequences:
            axes.barh(
                ring.ranks,
                (end - begin) / unit_s,
                left=begin / unit_s,
                height=0.82,
                color=scale.to_rgba(len(ring.ranks)),
                edgecolor="white",
                linewidth=0.5,
            )
    return scale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
