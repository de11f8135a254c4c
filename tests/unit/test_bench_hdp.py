"""What `bench.py hdp` draws, counts and writes; the ranks themselves are measured by running it."""

import json

import bench_hdp
import pytest
from bench_hdp import BATCH_TOKENS, BATCHES, CAPACITY, COMPARED, CONTEXT, MIXED, samples

from megascale.monitor.comparison import TimedStep
from megascale.planner import PLANNERS, CostModel, Problem

COST = CostModel(a=1e-8, b=1e-4, fixed=0.01, latency=0.01, transfer_intra=1e-5)


@pytest.mark.parametrize("kind", [*BATCHES.values(), *MIXED])
def test_batches_hold_what_they_should(kind):
    for seed in range(5):
        lengths = kind.draw(seed)
        assert lengths == kind.draw(seed)
        assert sum(lengths) == BATCH_TOKENS and 1 <= min(lengths) and max(lengths) <= CONTEXT
        assert lengths.count(CONTEXT) >= kind.num_giants
    assert kind.sigma == 0 or kind.draw(0) != kind.draw(1)


@pytest.mark.parametrize("world", CAPACITY)
def test_static_plans_give_every_sequence_all_ranks_on_long_tailed_batches_only(world):
    for name, kind in BATCHES.items():
        lengths = kind.draw(0)
        problem = Problem.of(lengths, world, CAPACITY[world], "free", COST)
        for planner in COMPARED:
            plan = PLANNERS[planner](problem)
            plan.check(lengths)
            sizes = {len(ring.ranks) for ring in plan.rings}
            if planner == "static":
                assert sizes == ({1} if name == "uniform" else {world})
        assert min(sizes) == 1, "hybrid leaves short sequences on one rank"


@pytest.mark.parametrize("world", CAPACITY)
def test_calibration_covers_every_ring_size_and_fits_memory(world):
    found = samples(world, CAPACITY[world], 12)
    assert {size for size, _ in found} == {size for size in (1, 2, 4) if size <= world}
    assert all(sum(lengths) <= size * CAPACITY[world] for size, lengths in found)


def results():
    """Results of a world as `run_rank` writes them, with known ratios."""
    static = [TimedStep(seconds, 1.0, 0.0, 5.0) for seconds in (2.0, 4.0, 3.0)]
    hybrid = [TimedStep(seconds, 0.5, 0.0, 5.0) for seconds in (1.0, 1.0, 2.0)]
    row = bench_hdp._row(hybrid, static, 2)
    same = bench_hdp._row(static, static, 2)
    planners = {"static": same, "static_best": same, "hybrid": row}
    compared = {"ranks": 2, "batch": "tail", "rounds": 3, "loss_difference": 1e-5}
    compared |= {"predicted_over_static": 1.9, "most_possible_over_static": 2.1}
    truth = {"ranks": 2, "passes": 1, "median_error": 0.05, "max_error": 0.2, "spread": 0.1}
    truth |= {"fit_error": 0.04, "predicted_s": [1.0, 2.0], "measured_s": [1.1, 2.0]}
    profile = {"ranks": 2, "batch": "tail", "planner": "static", "seconds": {"x": 1.0, "y": 3.0}}
    return {"compared": [compared | {"planners": planners}], "profiles": [profile], "truth": truth}


def test_ratios_are_medians_of_those_of_the_rounds():
    row = results()["compared"][0]["planners"]["hybrid"]
    assert row["over_static"] == 2.0 and row["most_over_static"] == 4.0
    assert row["least_over_static"] == 1.5 and row["processor_over_static"] == 2.0
    assert row["tokens_per_s"] == BATCH_TOKENS / 1.0
    assert row["processor_s"] == 0.25, "of a rank"


def test_report_and_files(tmp_path):
    text = "\n".join(bench_hdp.report(results()))
    assert "tail: 2.00x, goal 1.5x reached" in text
    assert "x 1.00 s (25%), y 3.00 s (75%)" in text
    assert "median error 5.0% (goal: 10%)" in text
    assert json.loads(bench_hdp.to_json(results()))["truth"]["predicted_s"] == [1.0, 2.0]
    bench_hdp.plot(results(), tmp_path / "hdp.png")
    assert (tmp_path / "hdp.png").stat().st_size > 10_000
