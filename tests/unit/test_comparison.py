"""Ratios of planners: what is computed from the times, and when the machine is too loaded."""

import json
import statistics

import numpy as np
import pytest

from megascale.commands.demo import RESULT
from megascale.config import finalize, parse_config
from megascale.corpus.batches import GlobalBatch
from megascale.monitor.comparison import Comparison, Round, Setting, TimedStep, plot_comparison
from megascale.monitor.ratios import MachineUse, Ratio, machine_busy_s, why_no_ratio
from megascale.planner import PLANNERS, CostModel, Problem
from megascale.run.step_problem import with_shared_context

COST = CostModel(a=1e-8, b=1e-4, fixed=0.01, latency=0.02, transfer_intra=1e-5)
LENGTHS = [400, 90, 30, 200, 55, 55]
SETTING = Setting(4, "cpu", 2, 2, "fp32", 128, 512, ("corpora/x",))
STATIC_S, BEST_S, OURS_S = [3.0, 2.4, 2.0, 2.6, 2.5], [2.2, 2.2, 2.0, 2.1, 2.0], [2.0] * 5


def comparison(static_s=STATIC_S, others_s=0.0, losses=(5.0, 5.0, 5.0), setting=SETTING):
    """Five rounds of known times, on one batch."""
    problem = Problem.of(LENGTHS, 4, 128, "free", COST)
    plans = {name: PLANNERS[name](problem) for name in ("static", "static_best", "hybrid")}
    zeros = np.zeros(len(LENGTHS), dtype=np.int64)
    batch = GlobalBatch(1, zeros.astype(np.int16), zeros, zeros, np.array(LENGTHS, np.int32))
    rounds = []
    for seconds in zip(static_s, BEST_S, OURS_S):
        steps = [TimedStep(s, 2 * s, others_s, loss) for s, loss in zip(seconds, losses)]
        rounds.append(Round(batch, plans, dict(zip(plans, steps))))
    return Comparison(setting, ("static", "static_best"), "hybrid", COST, 0.05, rounds)


def test_a_ratio_is_the_median_of_those_of_the_repeats():
    result = comparison()
    static, best = result.ratios["static"], result.ratios["static_best"]
    assert (static.median, static.least, static.most) == (1.25, 1.0, 1.5)
    assert (best.median, best.least, best.most) == (1.05, 1.0, 1.1)
    assert result.no_ratio is None
    text = "\n".join(result.lines())
    assert "hybrid over static: 1.25x (from 1.00x to 1.50x) as fast in 5 repeats" in text
    assert "hybrid over static_best: 1.05x (from 1.00x to 1.10x) as fast" in text
    plans = result.rounds[0].plans
    predicted = plans["static"].predicted_s / plans["hybrid"].predicted_s
    assert predicted > 1 and f"predicted {predicted:.2f}x\n" in text
    shown = [line.split()[:3] for line in text.split("\n")[2:5]]
    assert shown == [["static", "2.50", "s"], ["static_best", "2.10", "s"], ["hybrid", "2.00", "s"]]
    assert "losses: equal" in text


def test_a_ratio_of_one_is_printed_as_such():
    text = "\n".join(comparison(static_s=OURS_S).lines())
    assert "hybrid over static: 1.00x (from 1.00x to 1.00x) as fast" in text


@pytest.mark.parametrize(
    ("static_s", "others_s", "reason"),
    [
        (STATIC_S, 2.2, "other programs kept 1.0 of 2 cores busy while"),
        ([3.1, 2.4, 2.0, 2.6, 2.5], 0.0, "the repeats do not agree: 1.00x to 1.55x"),
    ],
)
def test_a_loaded_machine_gives_no_ratio(static_s, others_s, reason, tmp_path):
    """`others_s` are those of each step, of 2.2 s on average."""
    result = comparison(static_s, others_s)
    assert result.no_ratio is not None and reason in result.no_ratio
    text = "\n".join(result.lines())
    assert "no ratio: " in text and "as fast" not in text and "2.50 s" not in text
    assert "predicted for hybrid: " in text and "x over static_best" in text
    value = result.to_json()
    assert value["ratios"] is None and value["no_ratio"] == result.no_ratio
    assert value["rounds"][0]["planners"]["static"]["seconds"] == static_s[0]
    plot_comparison(result, tmp_path / "demo.png")


@pytest.mark.parametrize(
    ("others_cores", "cores", "usable", "is_loaded"),
    [
        (0.0, 2, 2, False),
        (0.4, 2, 2, False),
        (0.5, 2, 2, True),
        (40.0, 64, 4, False),
        (62.0, 64, 4, True),
        (1.0, 4, 2, False),
    ],
)
def test_other_programs_count_where_they_leave_too_little(others_cores, cores, usable, is_loaded):
    use = MachineUse(10.0, 10.0 * others_cores, cores, usable)
    assert (why_no_ratio([Ratio(1.0, 1.0, 1.0)], use) is not None) == is_loaded


def test_losses_that_differ_are_named():
    result = comparison(losses=(5.0, 5.0, 5.01))
    assert not result.losses_agree and "losses: NOT EQUAL" in "\n".join(result.lines())
    assert result.loss_difference == pytest.approx(0.002)
    bf16 = comparison(
        losses=(5.0, 5.0, 5.01), setting=Setting(**{**vars(SETTING), "precision": "bf16"})
    )
    assert bf16.losses_agree


def test_json_and_picture(tmp_path):
    result = comparison()
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(result.to_json()))
    assert RESULT.fits(path)
    value = json.loads(path.read_text())
    for name, ratio in value["ratios"].items():
        each = [
            one["planners"][name]["seconds"] / one["planners"]["hybrid"]["seconds"]
            for one in value["rounds"]
        ]
        assert (ratio["median"], ratio["least"], ratio["most"]) == (
            statistics.median(each),
            min(each),
            max(each),
        )
    assert value["rounds"][0]["lengths"] == LENGTHS
    plot_comparison(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_the_work_of_the_machine_is_counted():
    began, own = machine_busy_s(), 0
    while machine_busy_s() - began < 0.2 and own < 10**8:
        own += 1
    assert machine_busy_s() - began >= 0.2


@pytest.mark.parametrize(
    ("world", "capacity", "expected"), [(2, 1024, 512), (4, 512, 256), (3, 1024, 342)]
)
def test_the_context_needs_all_ranks(world, capacity, expected):
    text = "data: {sources: {a: {path: a}}, context_tokens: 1024}\ntrain: {tokens: 10000}"
    config = finalize(parse_config(text, [f"planner.capacity_tokens={capacity}"]), {"a": 9999}, 99)
    assert with_shared_context(config, world).planner.capacity_tokens == expected
