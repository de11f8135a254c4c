"""Waves of a pipeline in the order of the fewest seconds, against all orders and the timeline."""

import itertools

import numpy as np
import pytest

from megascale.planner import CostModel, Problem
from megascale.planner.hybrid.wave_order import order_waves, pipeline_s
from megascale.planner.plan_builder import Placed, complete

COST = CostModel(a=0.0, b=1.0)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_seconds_are_those_of_the_timeline(stages):
    rng = np.random.default_rng(stages)
    for count in (1, 2, 3, 7, 20):
        lengths = rng.integers(1, 100, count)
        problem = Problem.of(lengths, 1, 100, "aligned", COST, pipeline=stages)
        plan = complete(problem, [Placed((0,), [index]) for index in range(count)])
        assert pipeline_s(lengths.tolist(), stages) == pytest.approx(plan.predicted_s)


@pytest.mark.parametrize("stages", [2, 4])
def test_a_long_wave_is_hidden_by_those_around_it(stages):
    rng = np.random.default_rng(stages)
    for _ in range(20):
        wave_s = rng.integers(1, 9, 5).astype(float).tolist() + [20.0]
        (order, falling), seconds = order_waves(wave_s, stages)
        assert sorted(order) == list(range(6))
        assert seconds == pipeline_s([wave_s[wave] for wave in order], stages)
        best_s = min(pipeline_s(some, stages) for some in itertools.permutations(wave_s))
        falling_s = pipeline_s([wave_s[wave] for wave in falling], stages)
        assert [wave_s[wave] for wave in falling] == sorted(wave_s, reverse=True)
        assert best_s <= seconds <= 1.06 * best_s
        assert seconds < falling_s


def test_without_a_pipeline_the_longest_comes_first():
    assert order_waves([1.0, 3.0, 2.0], 1) == ([[1, 2, 0]], 6.0)
    assert order_waves([], 4) == ([[]], 0.0)
