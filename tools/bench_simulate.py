"""ByteScale's table on paper, with ours beside it: `python tools/bench.py simulate`.

Cumulative as in the paper (arXiv 2502.21231, section on experiments): static context parallelism,
dynamic communication, selective offload, balance. What differs from the paper is printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.config import Layout
from megascale.devices.rates import passing_share, paying_offload
from megascale.devices.table import device_of
from megascale.planner import PLANNERS, Problem
from megascale.planner.peers.bytescale import plan_bytescale, plan_bytescale_naive
from megascale.planner.peers.ring_sizes import smallest_ring
from megascale.planner.peers.static import plan_static_best
from megascale.simulate.cluster import MODELS, Cluster
from megascale.simulate.lengths import draw_lengths
from megascale.simulate.steps import Entrant, plan_static_mesh, replay, replay_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[1] / "configs/results"
CAPACITY, BATCH_TOKENS, STEPS = 8 << 10, 32 << 20, 3
CONTEXTS = (256 << 10, 512 << 10, 1 << 20, 2 << 20)
LENGTHS = ("github", "bytescale_byted")
DEVICES_OF = {"7b": 1024, "13b": 1024, "30b": 1024, "70b": 8192, "8x7b": 4096, "8x22b": 16384}
SEARCHED = "static, searched per batch"
STAGES = ("static", "+ dynamic", "+ offload", "+ balance", "hybrid")
COLOURS = ("#b0b0b0", "#92c5de", "#4393c3", "#2166ac", "#d6604d")
PAPER_STAGES = (1.00, 1.59, 2.01, 3.69)
PAPER_AT_2M = {"github": ((6.21, 7.89), (3.42, 4.28)), "bytescale_byted": ((4.26, 4.26),) * 2}
"""Speed-ups that the paper reports for models without and with pipelines."""
KEPT = (
    "planner step_s speedup over_lower_bound idle_share passing_share least_busy_s most_busy_s "
    "plan_s problem"
).split()


@dataclass(frozen=True)
class Cell:
    """One place of the table."""

    model: str
    devices: int
    lengths: str
    context: int
    network_gbps: int = 400

    def cluster(self) -> Cluster:
        """The cluster of this place; offload without limit, for the entrants to limit."""
        preset = MODELS[self.model]
        hdp = self.devices // (preset.tensor * preset.pipeline)
        layout = Layout(self.devices, preset.tensor, preset.pipeline, 1, hdp)
        return Cluster(
            model_name=self.model,
            model=preset.model,
            layout=layout,
            device_name="h100",
            device=device_of("h100", self.network_gbps),
            context=self.context,
            capacity=CAPACITY,
            batch_tokens=BATCH_TOKENS,
            mode=layout.mode,
            offload="all",
            budget_s=None,  # the same plans on any machine
        )


def cells() -> Iterator[Cell]:
    """The table, then a larger cluster, then a slower network."""
    for lengths in LENGTHS:
        for model, devices in DEVICES_OF.items():
            for context in CONTEXTS:
                yield Cell(model, devices, lengths, context)
        yield Cell("7b", 12288, lengths, 2 << 20)
        yield Cell("7b", 1024, lengths, 2 << 20, network_gbps=200)


def without(problem: Problem) -> Problem:
    """No offload."""
    return replace(problem, offload=None)


def paying(problem: Problem) -> Problem:
    """Offload as far as it saves time."""
    assert problem.offload is not None
    limited = paying_offload(problem.offload, problem.cost, problem.capacity)
    return replace(problem, offload=limited)


def entrants(context: int) -> list[Entrant]:
    """The paper's stages, with more offload, a mesh searched with hindsight, and ours."""
    return [
        Entrant("static", partial(plan_static_mesh, context=context)),
        Entrant("+ dynamic", plan_bytescale_naive, without),
        Entrant("+ offload", plan_bytescale_naive, paying),
        Entrant("+ balance", plan_bytescale, paying),
        Entrant("+ offload, where hidden", plan_bytescale_naive),
        Entrant("+ balance, where hidden", plan_bytescale),
        Entrant(SEARCHED, plan_static_best, without),
        Entrant("hybrid", PLANNERS["hybrid"], paying),
    ]


def bench_simulate() -> None:
    """Print the table, and write it and a picture of it to configs/results."""
    began, rows = time.monotonic(), []
    todo = list(cells())
    for number, cell in enumerate(todo):
        rows.append(_run(cell))
        _print(rows[-1])
        left = (time.monotonic() - began) / (number + 1) * (len(todo) - number - 1)
        print(f"{number + 1} of {len(todo)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (RESULTS / "simulate.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    plot(rows, RESULTS / "simulate.png")
    print("\n".join(["", *differences(rows)]))


def _run(cell: Cell) -> dict[str, Any]:
    cluster = cell.cluster()
    problems = [
        cluster.problem(draw_lengths(cell.lengths, BATCH_TOKENS, cell.context, step))
        for step in range(STEPS)
    ]
    replays = replay(problems, entrants(cell.context), cluster.cost.reduction_s)
    rows = replay_json(replays, "static", cluster.peak_bytes)
    ring = -(-cell.context // CAPACITY)
    return {
        "model": cell.model,
        "devices": cell.devices,
        "lengths": cell.lengths,
        "context": cell.context,
        "network_gbps": cell.network_gbps,
        "static_passing_share": _rounded(
            passing_share(problems[0].cost, ring * CAPACITY, 1024, ring)
        ),
        "planners": [{k: _rounded(row[k]) for k in KEPT if k in row} for row in rows],
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _print(cell: dict[str, Any]) -> None:
    print(
        f"\n{cell['model']} on {cell['devices']} x h100 ({cell['network_gbps']} Gbit/s), "
        f"{cell['lengths']}, {cell['context'] >> 10}K; passing on takes "
        f"{cell['static_passing_share']:.1%} of a static micro-batch of short sequences"
    )
    for row in cell["planners"]:
        if "problem" in row:
            print(f"  {row['planner']:<28} no plan: {row['problem']}")
            continue
        print(
            f"  {row['planner']:<28} {row['step_s']:8.2f} s {row['speedup']:6.2f}x  "
            f"{row['over_lower_bound']:6.3f} x bound  idle {row['idle_share']:4.0%}  "
            f"passing {row['passing_share']:4.0%}  busy {row['least_busy_s']:.2f} to "
            f"{row['most_busy_s']:.2f} s  plan {row['plan_s'] * 1e3:.0f} ms",
            flush=True,
        )


def _speedup(cell: dict[str, Any], planner: str) -> float:
    found = [row.get("speedup") for row in cell["planners"] if row["planner"] == planner]
    return found[0] if found and found[0] else float("nan")


def differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the paper reports beside what came out here."""
    lines = ["paper, and here:"]
    at_2m = [row for row in rows if row["context"] == 2 << 20]
    table = [row for row in at_2m if DEVICES_OF[row["model"]] == row["devices"]]
    table = [row for row in table if row["network_gbps"] == 400]
    for lengths, paper in (
        ("github", "6.21 to 7.89x, pipelines 3.42 to 4.28x"),
        ("bytescale_byted", "up to 4.26x"),
    ):
        for planner in ("+ balance", "hybrid"):
            found = {
                row["model"]: _speedup(row, planner) for row in table if row["lengths"] == lengths
            }
            here = ", ".join(f"{model} {speedup:.2f}x" for model, speedup in found.items())
            lines.append(f"  {lengths}, 2048K, {planner}: {paper}; {here}")
        found = {
            row["model"]: _speedup(row, "hybrid") / _speedup(row, SEARCHED)
            for row in table
            if row["lengths"] == lengths
        }
        here = ", ".join(f"{model} {speedup:.2f}x" for model, speedup in found.items())
        lines.append(f"  {lengths}, 2048K, hybrid over {SEARCHED}: {here}")
    for row in at_2m:
        if row["model"] == "7b" and row["devices"] == 1024:
            stages = " -> ".join(f"{_speedup(row, stage):.2f}" for stage in STAGES)
            lines.append(
                f"  7b, {row['lengths']}, {row['network_gbps']} Gbit/s: "
                f"1.00 -> 1.59 -> 2.01 -> 3.69; {stages} (ours)"
            )
    shares = sorted({row["static_passing_share"] for row in at_2m if row["model"] == "7b"})
    lines.append(
        "  passing in a static micro-batch: 97.6 %; " + ", ".join(f"{x:.1%}" for x in shares)
    )
    lines.append(_eq_3())
    in_order = sum(_is_in_order(row) for row in rows)
    lines.append(f"  stages in the paper's order: {in_order} of {len(rows)} places")
    return lines


def _eq_3() -> str:
    """What the paper's offload rule asks for where nothing but hiding the copies limits it."""
    problem = Cell("7b", 1024, "github", 2 << 20).cluster().problem([256 << 10])
    cost = problem.cost
    sizes = smallest_ring(problem.lengths, CAPACITY, cost, problem.offload)
    ring, tokens = int(sizes.ranks[0]), float(problem.lengths[0])
    alone_s = float(cost.seconds(tokens * tokens, tokens, ring, ring <= cost.node_size))
    return (
        f"  Eq. 3 with no other limit gives 256K tokens of the 7b {ring} ranks, which compute "
        f"{alone_s:.0f} s: more than a whole step of the speed-ups that the paper reports"
    )


def _is_in_order(row: dict[str, Any]) -> bool:
    speedups = [_speedup(row, stage) for stage in STAGES[:4]]
    return bool(np.all(np.diff(speedups) > -0.005))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed-ups over context, over models, and stage by stage beside the paper's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3, width_ratios=(1, 1.6, 1.1))
    for line, lengths in zip(panels, LENGTHS, strict=True):
        here = [row for row in rows if row["lengths"] == lengths]
        table = [row for row in here if row["network_gbps"] == 400]
        table = [row for row in table if DEVICES_OF[row["model"]] == row["devices"]]
        _draw_contexts(line[0], [row for row in table if row["model"] == "7b"])
        _draw_models(line[1], [row for row in table if row["context"] == 2 << 20], lengths)
        of_7b = [row for row in here if (row["model"], row["devices"]) == ("7b", 1024)]
        _draw_stages(line[2], [row for row in of_7b if row["context"] == 2 << 20])
        line[0].set_ylabel(f"{lengths}: speed-up over static")
        for axes in line:
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(bottom=0)
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_contexts(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        speedups = [_speedup(row, stage) for row in rows]
        axes.plot([f"{row['context'] >> 10}K" for row in rows], speedups, "o-", color=colour)
    axes.set_title("7b on 1,024 devices, by context", loc="left", fontsize=10)


def _draw_models(axes: Axes, rows: Sequence[dict[str, Any]], lengths: str) -> None:
    for position, (stage, colour) in enumerate(zip(STAGES, COLOURS, strict=True)):
        label = "static context parallelism" if stage == "static" else stage
        at = np.arange(len(rows)) + 0.17 * (position - 2)
        axes.bar(at, [_speedup(row, stage) for row in rows], 0.16, color=colour, label=label)
    for begin, (low, high) in zip((-0.5, 2.5), PAPER_AT_2M[lengths], strict=True):
        label = "ByteScale reports (of Byted: at most)" if begin < 0 else None
        bar = axes.bar(begin + 1.5, high - low + 0.06, 3, bottom=low - 0.03, label=label)
        bar.patches[0].set(color="#f4a582", alpha=0.45, zorder=0)
    axes.set_xticks(range(len(rows)), [f"{row['model']}\n{row['devices']:,}" for row in rows])
    axes.set_title("context 2048K, by model and devices", loc="left", fontsize=10)


def _draw_stages(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The 7b stage by stage: each network here, and the paper's ablation."""
    names = ["paper's ablation", *(f"here, {row['network_gbps']} Gbit/s" for row in rows)]
    for position, (stage, colour) in enumerate(zip(STAGES, COLOURS, strict=True)):
        paper = PAPER_STAGES[position] if position < len(PAPER_STAGES) else float("nan")
        heights = [paper, *(_speedup(row, stage) for row in rows)]
        bars = axes.bar(np.arange(3) + 0.17 * (position - 2), heights, 0.16, color=colour)
        axes.bar_label(bars, fmt=lambda value: f"{value:.1f}" if value == value else "", fontsize=7)
    axes.set_xticks(range(3), names)
    axes.set_title("7b, 1,024 devices, 2048K, stage by stage", loc="left", fontsize=10)
