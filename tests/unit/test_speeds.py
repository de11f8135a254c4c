"""Plans for ranks that are not equally fast, and how fast ranks are taken to be."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import COST_KEYS, judge
from test_hybrid import FLEXSP, _all_plans, costs, problems

from megascale.monitor.speeds import GRID, RankSpeeds
from megascale.planner import PlansAhead, Problem, plan_hybrid, plan_longest_first
from megascale.planner.bound import lower_bound_s
from megascale.planner.plan_builder import complete
from megascale.simulate.lengths import draw_lengths

paces = st.sampled_from([1.0, 1.05, 1.3, 2.0, 4.0])


@settings(max_examples=12)
@given(problem=problems(), data=st.data())
def test_plans_with_slow_ranks_are_valid_and_no_better_than_the_bound(problem, data):
    slowdown = data.draw(st.tuples(*[paces] * problem.num_ranks))
    slow = replace(problem, slowdown=slowdown)
    plan = plan_hybrid(slow)
    plan.check(slow.lengths)
    assert plan.predicted_s >= plan.lower_bound_s * (1 - 1e-9)
    assert plan.lower_bound_s >= lower_bound_s(problem) * (1 - 1e-6)
    assert plan_hybrid(slow).digest() == plan.digest()
    ones = replace(problem, slowdown=(1.0,) * problem.num_ranks)
    assert plan_hybrid(ones).digest() == plan_hybrid(problem).digest()


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    slowdown=st.lists(paces, min_size=1, max_size=3),
    capacity=st.integers(14, 40),
    cost=costs,
)
def test_against_every_plan_there_is(lengths, slowdown, capacity, cost):
    capacity = max(capacity, -(-max(lengths) // len(slowdown)))
    slow = tuple(slowdown)
    problem = Problem.of(lengths, len(slow), capacity, "free", cost, slowdown=slow)
    optimum_s = min(complete(problem, placed, 0.0).predicted_s for placed in _all_plans(problem))
    assert lower_bound_s(problem) <= optimum_s * (1 + 1e-9)
    assert plan_hybrid(problem).predicted_s <= 2 * max(slow) * optimum_s + 1e-12


def best_split_s(problem):
    """Seconds of the best plan of whole sequences without fixed costs: all ways to deal them."""
    ways = itertools.product(range(problem.num_ranks), repeat=len(problem.lengths))
    alone = problem.cost.compute_s(problem.lengths)
    dealt = np.array(list(ways))
    load = np.stack([(dealt == rank) @ alone for rank in range(problem.num_ranks)])
    return float((load * np.array(problem.slowdown)[:, None]).max(axis=0).min())


@pytest.mark.parametrize("slowdown", [(1.0, 1.5), (1.0, 1.25, 2.0), (1.0, 1.0, 1.0, 3.0)])
def test_work_over_speed_is_even(slowdown):
    cost = replace(FLEXSP, fixed=0.0)
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(200, 2000, 8)
        problem = Problem.of(lengths, len(slowdown), 16384, "free", cost, slowdown=slowdown)
        assert plan_hybrid(problem).predicted_s <= 1.15 * best_split_s(problem)


@pytest.mark.parametrize(("mode", "most"), [("free", 1.02), ("lockstep", 1.13), ("aligned", 1.2)])
def test_a_slow_rank_costs_little_more_than_its_share(mode, most):
    """Also by the judge, which times plans without the planner's own code."""
    lengths = np.random.default_rng(0).integers(100, 6000, 400)
    pipeline = 4 if mode == "aligned" else 1
    slow = (1.0, 1.5, *[1.0] * 6)
    aware = Problem.of(lengths, 8, 8192, mode, FLEXSP, pipeline=pipeline, slowdown=slow)
    plans = [plan_hybrid(aware), plan_hybrid(replace(aware, slowdown=()))]
    cost = {key: getattr(FLEXSP, key) for key in COST_KEYS}
    verdicts = [judge(plan.to_json(), lengths, cost, 4, slow) for plan in plans]
    assert not verdicts[0].problems and verdicts[0].lower_bound_s <= plans[0].predicted_s
    judged = [one.mode_s(mode) for one in verdicts]
    assert judged[0] == pytest.approx(plans[0].predicted_s)
    assert judged[0] <= most * plans[0].lower_bound_s
    assert judged[1] >= 1.15 * judged[0]


def test_other_planners_are_timed_with_slow_ranks():
    problem = Problem.of([100] * 8, 2, 400, "free", FLEXSP)
    slow = replace(problem, slowdown=(1.0, 2.0))
    assert plan_longest_first(slow).predicted_s == 2 * plan_longest_first(problem).predicted_s


def test_slowdowns_reach_the_planner_process_and_are_checked():
    problem = Problem.of([5, 7], 2, 10, "free", FLEXSP, slowdown=(1.0, 1.5))
    plans = PlansAhead(plan_hybrid, 120.0)
    planned = plans.result(plans.request(problem))
    plans.close()
    assert planned.trouble is None and planned.plan.digest() == plan_hybrid(problem).digest()
    assert planned.plan.digest() != plan_hybrid(replace(problem, slowdown=())).digest()
    for wrong in ((1.0,), (1.0, 0.5), (1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="slowdown"):
            Problem.of([5], 2, 10, "free", FLEXSP, slowdown=wrong)


def watch(over, comparisons, speeds=None, seed=0, noise=0.015):
    """Steps of changes, after so many comparisons of ranks that are `over` times as slow."""
    draw, changed = np.random.default_rng(seed), []
    speeds = speeds or RankSpeeds(range(len(over)), 2)
    for number in range(1, comparisons + 1):
        seen = np.array(over) * np.exp(noise * draw.standard_normal(len(over)))
        changed += [first for first in [speeds.see(10 * number, seen)] if first is not None]
    return speeds, changed


def test_noise_changes_no_plan():
    for seed in range(10):
        speeds, changed = watch([1.0, 0.99, 1.01, 1.0], 200, seed=seed)
        assert changed == [] and speeds.at(5000) == ()


@pytest.mark.parametrize("slow", [1.1, 1.33, 2.0])
def test_a_slow_rank_is_found_and_then_left_at_that(slow):
    for seed in range(10):
        speeds, changed = watch([1.0, slow, 1.0, 1.0], 200, seed=seed)
        assert len(changed) <= 12 and changed[0] <= 50
        held = speeds.at(5000)
        assert held[0] == held[2] == held[3] == 1.0 and held[1] == pytest.approx(slow, abs=GRID)
        assert round(held[1] / GRID, 6) == round(held[1] / GRID)


def test_changes_hold_from_steps_that_are_not_planned_yet():
    speeds = RankSpeeds([0, 1], 2)
    assert speeds.see(10, np.array([1.0, 3.0])) == 13
    assert speeds.at(12) == () and speeds.at(13) == (1.0, 1.6)
    assert speeds.see(11, np.array([1.0, 3.0])) == 14
    assert [len(speeds.at(step)) for step in (12, 13, 14)] == [0, 2, 2]
    assert speeds.see(400, np.array([np.nan, np.nan])) is None  # nothing was measured
    worst, _ = watch([1.0, 1000.0], 100, speeds)
    assert worst.at(10**6) == (1.0, 4.0)


def test_the_slowest_rank_of_a_place_counts():
    speeds, _ = watch([1.0, 2.0, 1.0, 1.0], 50, RankSpeeds([0, 0, 1, 1], 2))
    assert speeds.at(10**6)[0] > 1.9 and speeds.at(10**6)[1] == 1.0


def test_a_resumed_run_counts_as_the_run_would_have():
    speeds, _ = watch([1.0, 1.5], 3)
    saved = json.loads(json.dumps(speeds.to_json()))
    again = RankSpeeds([0, 1], 2)
    assert again.go_on(saved) and again.to_json() == speeds.to_json()
    assert [again.at(step) for step in range(60)] == [speeds.at(step) for step in range(60)]
    assert not RankSpeeds([0, 1, 2], 2).go_on(saved)
    assert again.go_on(None) and again.at(50) == speeds.at(50)


@pytest.mark.parametrize(("mode", "most"), [("free", 1.03), ("lockstep", 1.25), ("aligned", 1.25)])
def test_rings_keep_to_ranks_of_one_speed(mode, most):
    """Every second node takes twice as long, and only a fifth of the work is in short sequences.
    A ring with ranks of both kinds would waste half of the fast ones (lockstep mode: 1.44)."""
    lengths = draw_lengths("github", None, 128 << 10, 0, num_sequences=512)
    slow = tuple(2.0 if rank // 8 % 2 else 1.0 for rank in range(64))
    problem = Problem.of(lengths, 64, 16 << 10, mode, FLEXSP, slowdown=slow)
    plan = plan_hybrid(problem)
    plan.check(lengths)
    mixed = [ring for ring in plan.rings if len({slow[rank] for rank in ring.ranks}) > 1]
    assert len(mixed) <= 2
    assert plan.predicted_s <= most * plan.lower_bound_s
