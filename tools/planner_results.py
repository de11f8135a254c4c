"""Results of `bench.py planner`: their rows, `planner.json`, the picture and the guide's tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.parsing import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[1] / "configs" / "results"
MODES = ("free", "lockstep", "aligned")
PIPELINE = 4
OURS = "hybrid"
NAMES = {
    OURS: "hybrid",
    "bytescale": "ByteScale",
    "flexsp": "FlexSP",
    "static": "static",
    "static_best": "static*",
    "lpt": "longest first",
    "lpt_best": "longest first*",
    "verl_kk": "verl",
    "megatron_core": "megatron-core",
    "wlb_llm": "WLB-LLM",
    "dhp": "DHP",
}
"""Planners as people read them; *: with the ring size that is best for the batch, in hindsight."""
AHEAD, BEHIND, INK = "#2166ac", "#d6604d", "#303030"
LEAST_EXCESS, MOST_EXCESS = -0.04, 0.20
"""Ends of the picture's axis, so that two pictures compare; a longer bar is cut."""


@dataclass(frozen=True)
class Row:
    """One plan, judged."""

    scenario: str
    planner: str
    mode: str
    ratio: float | None = None
    """Step time over the judge's bound of the mode; None where there is no plan."""
    fill: float | None = None
    """In aligned mode, step time over the fill bound: that of 1F1B if work could be cut at will."""
    plan_s: float | None = None
    problem: str = ""
    """Why there is no plan, or which rule it breaks."""


@dataclass(frozen=True)
class Duel:
    """Ours against the best valid plan of any peer, of one batch."""

    scenario: str
    peer: str
    excess: float
    """The peer's step time beyond ours, as a part of ours; negative where the peer is ahead."""


def read_results(path: Path) -> tuple[dict[str, str], list[Row]]:
    """(what each batch is, the rows) of a `planner.json`."""
    document = read_json(path)
    rows = [
        Row(scenario, planner, mode, **{"problem": "", **values})
        for key, found in document["results"].items()
        for mode, planner in [key.split()]
        for scenario, values in found.items()
    ]
    return document["scenarios"], rows


def duels(rows: Sequence[Row], mode: str) -> list[Duel]:
    """The batches of a mode in which ours and a peer have a valid plan."""
    found = []
    for scenario in dict.fromkeys(row.scenario for row in rows):
        valid = {
            row.planner: row.ratio
            for row in rows
            if (row.scenario, row.mode) == (scenario, mode) and row.ratio and not row.problem
        }
        ours = valid.pop(OURS, None)
        if ours and valid:
            peer = min(valid, key=lambda name: valid[name])
            found.append(Duel(scenario, peer, valid[peer] / ours - 1))
    return found


def plot(rows: Sequence[Row], batches: Mapping[str, str], path: Path) -> None:
    """By batch, how much longer the best peer's step takes than ours, a panel for each mode.

    `batches` says what each batch is.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from megascale.monitor.plot_style import STYLE

    with matplotlib.rc_context({**STYLE, "figure.figsize": (14.0, 2.2 + 0.32 * len(batches))}):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(MODES), sharey=True, squeeze=False)[0]
        for mode, axes in zip(MODES, panels, strict=True):
            _plot_duels(axes, duels(rows, mode), list(batches))
            stages = f", {PIPELINE} pipeline stages" if mode == "aligned" else ""
            axes.set_title(f"{mode} mode{stages}", fontsize=11)
        panels[0].set_yticks(range(len(batches)), [f"{what}  {n}" for n, what in batches.items()])
        panels[0].set_ylim(len(batches) - 0.4, -0.6)
        figure.suptitle(
            f"How much longer the best peer's step takes than that of {NAMES[OURS]}, by batch",
            x=0.01, ha="left", fontsize=14, fontweight="bold",
        )  # fmt: skip
        figure.supxlabel(
            "step time of the best peer (its name is beside the bar) beyond that of hybrid, on "
            "paper; orange: the peer is faster\n*: with the ring size that is best for the batch, "
            "in hindsight",
            fontsize=10, color=INK,
        )  # fmt: skip
        figure.savefig(path, dpi=100)


def _plot_duels(axes: Axes, found: Sequence[Duel], order: Sequence[str]) -> None:
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    for duel in found:
        place, shown = order.index(duel.scenario), min(duel.excess, MOST_EXCESS)
        axes.barh(place, shown, height=0.62, color=AHEAD if duel.excess >= 0 else BEHIND)
        percent = f"{duel.excess:+.1%}" if abs(duel.excess) >= 0.0005 else "equal"
        text = f" {percent}  {NAMES.get(duel.peer, duel.peer)}"
        beside = max(0.0, shown) if shown < MOST_EXCESS / 2 else 0.0
        colour = INK if beside or shown < MOST_EXCESS / 2 else "white"
        axes.text(beside, place, text, va="center", fontsize=8.5, color=colour)
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(LEAST_EXCESS, MOST_EXCESS)
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def tables(rows: Sequence[Row], batches: Mapping[str, str]) -> Iterator[str]:
    """Markdown lines: what the batches are, then every planner's result, a table for each mode."""
    yield from ("| batch | lengths, ranks and capacity, context, size |", "|---|---|")
    yield from (f"| {name} | {what} |" for name, what in batches.items())
    for mode in MODES:
        found = {(row.scenario, row.planner): row for row in rows if row.mode == mode}
        planners = [name for name in NAMES if any(planner == name for _, planner in found)]
        yield from ("", f"| {mode} | {' | '.join(NAMES[name] for name in planners)} |")
        yield "|---" * (len(planners) + 1) + "|"
        for name in batches:
            cells = " | ".join(ratio_text(found.get((name, planner))) for planner in planners)
            yield f"| {name} | {cells} |"


NO_PLAN = (("no plan in", "late"), ("sequence", "wrong"), ("ring", "wrong"))
"""What stands for a plan that has no time, by how its problem begins."""


def ratio_text(row: Row | None) -> str:
    """The step time over the bound; with ! where the plan breaks a rule, - where none was made."""
    if row is None:
        return "-"
    if row.ratio is None:
        return next((word for start, word in NO_PLAN if row.problem.startswith(start)), "crash")
    broken = "!" if row.problem else ""
    return f"{row.ratio:.3f}{broken}" if row.ratio < 100 else f"{row.ratio:.0f}{broken}"


def results_json(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """`planner.json`: what `head` says, then all rows, a planner and mode a line."""
    results: dict[str, dict[str, object]] = {}
    for row in rows:
        kept = {name: getattr(row, name) for name in ("ratio", "fill", "plan_s", "problem")}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in kept.items() if v}
        results.setdefault(f"{row.mode} {row.planner}", {})[row.scenario] = rounded
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in results.items())
    return "{\n" + ",\n".join(lines) + ',\n "results": {\n' + body + "\n }\n}\n"
