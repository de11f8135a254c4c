"""Seconds of plans with chunks, against a slow simulator and the formula summed by hand."""

import chunk_plans
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.errors import UserError
from megascale.planner import CostModel, Ring, StepPlan, step_s
from megascale.planner.timeline import ring_seconds

COST = CostModel(
    a=2e-3, b=0.5, fixed=3.0, latency=0.7, transfer_intra=0.1, transfer_inter=0.2, node_size=2,
    pass_intra=0.05, pass_inter=0.3, prefix_intra=0.03, prefix_inter=0.06,
)  # fmt: skip
MODES = st.sampled_from(["aligned", "lockstep"])


def slow_seconds(ring, lengths, cost):
    """The documented formula, a token at a time."""
    size = len(ring.ranks)
    inside = len({rank // cost.node_size for rank in ring.ranks}) == 1
    where = "intra" if inside else "inter"
    attention = work = passed = 0.0
    for begin, end in ring.token_spans(lengths):
        for position in range(begin, end):
            attention += cost.a * ((position + 1) ** 2 - position**2)
            work += cost.b + (size > 1) * getattr(cost, f"transfer_{where}")
        work += (size > 1) * getattr(cost, f"prefix_{where}") * begin
        passed += end
    hidden = max(0.0, getattr(cost, f"pass_{where}") * passed * (size - 1) - attention)
    work += attention + (hidden if size > 1 else 0.0)
    return cost.fixed + cost.latency * np.log2(size) + work / size


@given(st.integers(0, 2**32))
@settings(max_examples=25)
def test_seconds_of_a_chunk_are_the_documented_formula(seed):
    plan = chunk_plans.random_plan(np.random.default_rng(seed), 5, 2)
    slow = [slow_seconds(ring, plan.lengths, COST) for ring in plan.rings]
    assert ring_seconds(plan, plan.lengths, COST) == pytest.approx(slow)


def test_on_one_rank_chunks_add_the_fixed_part_alone():
    whole = StepPlan(1, "aligned", 90, 0, 0, 0, (Ring(0, (0,), (0,), 0.0, 0),))
    spans = [(0, 40), (40, 70), (70, 90)]
    rings = [Ring(i, (0,), (0,), 0.0, i, 0, i, 3, (span,)) for i, span in enumerate(spans)]
    cut = StepPlan(1, "aligned", 90, 0, 0, 0, tuple(rings), pipeline=2)
    total = float(ring_seconds(cut, [90], COST).sum())
    assert total == pytest.approx(float(ring_seconds(whole, [90], COST).sum()) + 2 * COST.fixed)


def slow_step_s(plan, cost, stages):
    """Event by event: a pass begins when all ranks of its ring, and of the expert groups, can."""
    orders = {
        (rank, stage): plan.stage_order(rank, stage, stages)
        for rank in range(plan.num_ranks)
        for stage in range(stages)
    }
    members = {(rank, ring.index): ring for ring in plan.rings for rank in ring.ranks}
    seconds = {ring.id: slow_seconds(ring, plan.lengths, cost) for ring in plan.rings}
    free = dict.fromkeys(orders, 0.0)
    ended = {}
    while any(orders.values()):
        for stage in range(stages):
            ready = {}
            for rank in range(plan.num_ranks):
                if orders[rank, stage]:
                    backward, index = orders[rank, stage][0]
                    before = stage + 1 if backward else stage - 1
                    at = 0.0
                    if 0 <= before < stages:
                        at = ended.get((rank, before, backward, index), np.inf)
                    ready[rank] = max(free[rank, stage], at)
            together = range(plan.num_ranks) if plan.mode == "lockstep" else None
            for rank in list(ready):
                backward, index = orders[rank, stage][0]
                ring = members[rank, index]
                waiting = together if together is not None else ring.ranks
                same = [r for r in waiting if orders[r, stage][:1] == [(backward, index)]]
                begin = max(ready.get(r, np.inf) for r in same)
                if len(same) < len(waiting) or begin == np.inf:
                    continue
                for other in same:
                    took = seconds[members[other, index].id] * (2 / 3 if backward else 1 / 3)
                    orders[other, stage].pop(0)
                    free[other, stage] = begin + took
                    ended[other, stage, backward, index] = begin + took
                break
    return max(free.values())


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(2, 4), MODES)
@settings(max_examples=25)
def test_a_step_takes_what_a_slow_simulator_says(seed, num_ranks, stages, mode):
    plan = chunk_plans.random_plan(np.random.default_rng(seed), num_ranks, stages, mode=mode)
    fast = step_s(plan, plan.lengths, COST, stages)
    assert fast == pytest.approx(slow_step_s(plan, COST, stages))


def test_chunks_fill_a_pipeline_faster():
    """One wave of 8 chunks on 4 stages, without fixed parts: 1 + 3/8 of its time, not 4 times."""
    cost = CostModel(a=0.0, b=1.0)
    spans = [(10 * i, 10 * i + 10) for i in range(8)]
    rings = [Ring(i, (0,), (0,), 0.0, i, 0, i, 8, (span,)) for i, span in enumerate(spans)]
    cut = StepPlan(1, "aligned", 80, 0, 0, 0, tuple(rings), pipeline=4)
    assert step_s(cut, [80], cost, 4) == pytest.approx(80 * (1 + 3 / 8))
    whole = StepPlan(1, "aligned", 80, 0, 0, 0, (Ring(0, (0,), (0,), 0.0, 0),))
    assert step_s(whole, [80], cost, 4) == pytest.approx(80 * 4)


def test_a_cost_file_without_prefixes_takes_what_travels_the_first_time(tmp_path):
    path = tmp_path / "cost.json"
    text = '{"a": 1, "b": 1, "fixed": 0, "latency": 0, "transfer_intra": 2, "transfer_inter": 3'
    path.write_text(text + ', "node_size": 8}')
    cost = CostModel.load(path)
    assert (cost.prefix_intra, cost.prefix_inter) == (2, 3)
    path.write_text(text + ', "node_size": 8, "prefix_inter": 7}')
    assert (CostModel.load(path).prefix_intra, CostModel.load(path).prefix_inter) == (2, 7)
    path.write_text(text + ', "node_size": 8, "prefix_inter": -7}')
    with pytest.raises(UserError, match="prefix_inter = -7 must be a number"):
        CostModel.load(path)
