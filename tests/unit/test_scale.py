"""What is printed, checked and sent of a plan grows with the plan, not with ranks times rings."""

from dataclasses import replace

import pytest

from megascale.planner import CostModel, Ring, StepPlan, timeline
from megascale.planner.gantt import text_gantt
from megascale.planner.timeline import step_s
from megascale.run.describe import _pipeline

COST = CostModel(a=1e-9, b=1e-5, fixed=2e-3, latency=1e-4, transfer_intra=1e-8, node_size=4)
RANKS, WAVES = 512, 8


class Counted(tuple):
    """Ranks of a ring that count how many of them are looked at."""

    looks = 0

    def __iter__(self):
        Counted.looks += len(self)
        return super().__iter__()

    def __contains__(self, rank):
        Counted.looks += len(self)
        return super().__contains__(rank)


def wide_plan() -> StepPlan:
    """In each of the waves a ring of half the ranks, and one ring for each of the others."""
    rings = []
    for wave in range(WAVES):
        shares = [range(RANKS // 2), *([rank] for rank in range(RANKS // 2, RANKS))]
        for ranks in shares:
            rings.append(Ring(len(rings), Counted(ranks), (len(rings),), 0.0, wave))
    return StepPlan(RANKS, "aligned", 1000, 1.0, 0.5, 0.0, tuple(rings))


LOOKS = {
    "counts": lambda plan, lengths: plan.counts(),
    "bubble": lambda plan, lengths: _pipeline(4, plan),
    "text": lambda plan, lengths: text_gantt(plan, lengths, COST),
    "check": lambda plan, lengths: plan.check(lengths),
    "timeline": lambda plan, lengths: timeline(plan, lengths, COST),
    "pipeline": lambda plan, lengths: step_s(plan, lengths, COST, pipeline=4),
    "bytes": lambda plan, lengths: plan.to_bytes(),
    "own part": lambda plan, lengths: plan.rings_of(RANKS - 1),
}


@pytest.mark.parametrize("name", LOOKS)
def test_each_rank_of_each_ring_is_looked_at_a_few_times(name: str) -> None:
    plan = wide_plan()
    members, Counted.looks = RANKS * WAVES, 0
    LOOKS[name](plan, [100] * len(plan.rings))
    assert Counted.looks <= 6 * members


def test_counts_are_the_rings_of_each_rank() -> None:
    plan = wide_plan()
    kept = replace(plan, rings=plan.rings[: len(plan.rings) // 2 + 3])
    assert kept.counts() == [len(kept.rings_of(rank)) for rank in range(RANKS)]
    assert len(set(kept.counts())) == 2
