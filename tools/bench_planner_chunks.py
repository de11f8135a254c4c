"""Plans with chunks on the batches of `bench.py planner`, judged from outside.

The step time of `hybrid` with whole sequences and with chunks, over the fill bound: that of 1F1B
if all work could be cut at will, where a rank holds as many micro-batches as there are stages.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from judge import judge
from numpy.typing import NDArray

from megascale.planner import PLANNERS, CostModel, Problem, StepPlan, fill_bound_s

if TYPE_CHECKING:
    from bench_planner import Scenario

STAGES = (4, 8)
MOST_CHUNKS = 48
GOALS = {4: (1.10, 1.15, 1.08), 8: (1.13, 1.18, 1.11)}
"""Over the fill bound, by stages: the median, the worst, and batches with giants."""
GIANT = 32
"""A sequence of at least that many times the capacity is a giant."""


@dataclass(frozen=True)
class ChunkRow:
    """One batch on a pipeline."""

    scenario: str
    stages: int
    whole: float
    """Step time of whole sequences over the fill bound."""
    chunked: float
    """The same with chunks."""
    peak: float
    """Most tokens of a rank at a time, over what all stages hold of a rank."""
    giants: bool
    """Whether the longest sequence is a giant."""
    plan_s: float
    """Seconds to plan with chunks."""
    problem: str = ""
    """Rules that the plan with chunks breaks."""


def chunk_row(
    name: str, scenario: Scenario, stages: int, seed: int, cost: Mapping[str, float]
) -> ChunkRow:
    """Plan one batch twice, and judge both plans."""
    lengths = scenario.draw(seed)
    problem = Problem.of(
        lengths,
        scenario.num_ranks,
        scenario.capacity,
        "aligned",
        CostModel(**cost),  # type: ignore[arg-type]
        pipeline=stages,
        chunks=MOST_CHUNKS,
    )
    bound_s = fill_bound_s(problem)
    plans = [PLANNERS["hybrid"](one) for one in (replace(problem, chunks=1), problem)]
    verdicts = [
        judge(json.loads(json.dumps(plan.to_json())), lengths, cost, stages) for plan in plans
    ]
    return ChunkRow(
        scenario=name,
        stages=stages,
        whole=verdicts[0].pipeline_s / bound_s,
        chunked=verdicts[1].pipeline_s / bound_s,
        peak=_peak(plans[1], lengths, stages),
        giants=bool(lengths.max() >= GIANT * scenario.capacity),
        plan_s=plans[1].plan_s,
        problem="; ".join(verdicts[1].problems),
    )


def _peak(plan: StepPlan, lengths: NDArray[np.int64], stages: int) -> float:
    from megascale.planner.chunk_rules import peak_tokens

    peaks = peak_tokens(plan.rings, lengths.tolist(), plan.num_ranks, stages, plan.stage_layers)
    return float(peaks.max()) / (stages * plan.capacity)


def lines(rows: Sequence[ChunkRow]) -> Iterator[str]:
    """A table and, for each number of stages, the goals."""
    yield "aligned, over the fill bound at a capacity of all stages: whole, in chunks"
    yield f"{'':<6}{'stages':>7}{'whole':>8}{'chunks':>8}{'memory':>8}{'plan':>9}"
    for row in rows:
        time = f"{row.plan_s * 1e3:.0f} ms"
        ratios = f"{row.whole:>8.3f}{row.chunked:>8.3f}{row.peak:>8.2f}"
        yield f"{row.scenario:<6}{row.stages:>7}{ratios}{time:>9}  {row.problem}"
    for stages, (median, worst, giants) in GOALS.items():
        some = [row for row in rows if row.stages == stages]
        if not some:
            continue
        found = [row.chunked for row in some]
        giant = max((row.chunked for row in some if row.giants), default=math.nan)
        yield (
            f"{stages} stages: chunks median {statistics.median(found):.3f} (goal: {median:.2f}), "
            f"worst {max(found):.3f} (goal: {worst:.2f}), with giants {giant:.3f} "
            f"(goal: {giants:.2f}); whole median {statistics.median(r.whole for r in some):.3f}"
        )


def values(rows: Sequence[ChunkRow]) -> list[dict[str, object]]:
    """All rows as JSON."""
    return [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in one.items()}
        for one in map(asdict, rows)
    ]
