"""Reductions and gathers beside computation: no order of a planned step can hang."""

import numpy as np
import pytest
from stream_model import hangs, step

from megascale.planner import CostModel, Placed, Problem, complete, find_planner

COST = CostModel(
    a=5e-9, b=2e-4, fixed=1e-2, latency=3e-3, transfer_intra=2e-5, transfer_inter=5e-5, node_size=4
)
NUM_RANKS, CAPACITY = 8, 1000


def plan_of(*placed):
    """A plan in free mode of (ranks, tokens) in execution order."""
    problem = Problem.of([tokens for _, tokens in placed], 2, CAPACITY, "free", COST)
    return complete(problem, [Placed(ranks, [i]) for i, (ranks, _) in enumerate(placed)])


FIRST = plan_of(([0], 9), ([0, 1], 1500), ([1], 9), ([0], 9))
LAST_ON_A = plan_of(([1, 0], 1500), ([1], 9))


@pytest.mark.parametrize("plan", [FIRST, LAST_ON_A])
def test_what_is_done_between_steps_or_first_never_hangs(plan):
    for one_queue in (False, True):
        assert not hangs(step(plan, overlap=False), one_queue)
        assert not hangs(step(FIRST, overlap=True), one_queue)


def test_the_model_finds_the_orders_that_hang():
    assert FIRST.ends_without_rings and not LAST_ON_A.ends_without_rings
    assert hangs(step(LAST_ON_A, overlap=True), one_queue=True)
    assert not hangs(step(LAST_ON_A, overlap=True), one_queue=False)
    assert hangs(step(FIRST, overlap=False, gathers="lazy"), one_queue=True)


def test_no_planned_step_hangs():
    """1,000 plans of batches with long tails, by the rule that a step follows."""
    hybrid, rng = find_planner("hybrid"), np.random.default_rng(0)
    overlapped = rings_last = hang_without_rule = 0
    for _ in range(1000):
        lengths = np.minimum(rng.pareto(1.1, rng.integers(20, 100)) * 90 + 1, 3000).astype(int)
        plan = hybrid(Problem.of(lengths, NUM_RANKS, CAPACITY, "free", COST, budget_s=0.0))
        overlap = plan.ends_without_rings
        overlapped += overlap
        for one_queue in (False, True):
            assert not hangs(step(plan, overlap), one_queue)
        if not overlap:
            rings_last += 1
            hang_without_rule += hangs(step(plan, True), one_queue=True)
    assert overlapped > 500
    assert 0 < hang_without_rule <= rings_last
