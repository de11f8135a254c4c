"""The least that filling a pipeline costs: by hand, and against random cuts and real plans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.planner import CostModel, Problem, fill_bound_s, lower_bound_s, plan_hybrid
from megascale.planner.fill_bound import fill_factor
from megascale.planner.hybrid.wave_order import pipeline_s

COST = CostModel(a=1e-6, b=1e-3, fixed=0.5, latency=0.1, node_size=4)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_a_single_micro_batch_passes_all_stages(stages: int) -> None:
    assert fill_factor(stages, 1.0) == pytest.approx(stages)


def test_two_stages_by_hand() -> None:
    """With nothing fixed, slots shrink towards both ends and the fill vanishes. With half of the
    work fixed, a second micro-batch costs as much as it hides."""
    assert fill_factor(2, 0.5) == pytest.approx(2.0)
    assert 1.0 < fill_factor(2, 1e-4) < 1.02


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("fixed_share", [0.2, 0.05])
def test_no_cut_is_faster_and_some_cut_is_as_fast(stages: int, fixed_share: float) -> None:
    rng, factor = np.random.default_rng(stages), fill_factor(stages, fixed_share)
    best_s = np.inf
    for count in range(1, 16):
        shares = np.full(count, 1.0 / count)
        least_s = np.inf
        for step in range(300):
            tried = np.abs(shares + rng.normal(0, 0.3 / count / (1 + step / 30), count))
            tried /= tried.sum()
            wave_s = fixed_share + (1 - fixed_share) * tried
            seconds = pipeline_s(wave_s.tolist(), stages)
            assert seconds >= factor * (1 - 1e-9)
            if seconds < least_s:
                shares, least_s = tried, seconds
        best_s = min(best_s, least_s)
    assert best_s <= 1.03 * factor


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=30),
    num_ranks=st.integers(1, 8),
    stages=st.integers(1, 4),
    mode=st.sampled_from(["aligned", "lockstep"]),
)
def test_plans_of_whole_sequences_take_no_less(lengths, num_ranks, stages, mode) -> None:
    problem = Problem.of(lengths, num_ranks, 4000, mode, COST, pipeline=stages)
    bound_s = fill_bound_s(problem)
    assert bound_s >= lower_bound_s(problem)
    assert plan_hybrid(problem).predicted_s >= bound_s * 0.995


def test_without_stages_and_with_very_many_it_is_the_lower_bound() -> None:
    for stages in (1, 9):
        problem = Problem.of([100] * 50, 4, 200, "aligned", COST, pipeline=stages)
        assert fill_bound_s(problem) == lower_bound_s(problem)
    assert lower_bound_s(problem) >= 8 * COST.fixed
    idle = Problem.of([], 4, 200, "aligned", COST, pipeline=4)
    assert fill_bound_s(idle) == pytest.approx(4 * COST.fixed)
