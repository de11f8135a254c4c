"""Plans above one another: what is drawn where."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from megascale.planner import PLANNERS, CostModel, Problem, Ring, StepPlan, timeline
from megascale.planner.ring_marks import OUTLINE
from megascale.planner.stacked_gantt import HEIGHT, IDLE, TitledPlan, _draw, plot_stacked

COST = CostModel(a=1e-8, b=1e-4, fixed=0.01, latency=0.02, transfer_intra=1e-5)
LENGTHS = [400, 90, 30, 200, 55, 55]


def drawn(plan, lengths, width_s):
    """The axes on which a plan is drawn, `width_s` seconds wide."""
    axes = Figure().subplots()
    axes.set_xlim(0, width_s)
    _draw(axes, plan, lengths, COST, 1.0)
    return axes


@pytest.mark.parametrize("planner", ["static", "hybrid"])
def test_each_ring_is_outlined_and_says_its_size(planner):
    plan = PLANNERS[planner](Problem.of(LENGTHS, 4, 128, "free", COST))
    axes, times = drawn(plan, LENGTHS, plan.predicted_s), timeline(plan, LENGTHS, COST)
    shared = [len(ring.ranks) for ring in plan.rings if len(ring.ranks) > 1]
    assert sorted(text.get_text() for text in axes.texts) == sorted(map(str, shared))
    outlined = [bar for bar in axes.patches if to_hex(bar.get_edgecolor()) == OUTLINE]
    assert len(outlined) == len(shared)
    idle = [bar for bar in axes.patches if to_hex(bar.get_facecolor()) == IDLE]
    assert len(idle) == 4 and {bar.get_width() for bar in idle} == {times.total_s}
    work = sum(
        bar.get_width() * round(bar.get_height() - HEIGHT + 1)
        for bar in axes.patches
        if bar not in idle and bar not in outlined
    )
    assert work == pytest.approx(times.busy_s.sum())


def test_a_ring_of_ranks_that_are_apart_has_an_outline_for_each_part():
    rings = (Ring(0, (0, 1, 3), (0,), 0.0, 0), Ring(1, (2,), (1,), 0.0, 0))
    plan = StepPlan(4, "free", 1000, 1.0, 1.0, 0.0, rings)
    axes = drawn(plan, [300, 100], 1.0)
    outlined = [bar for bar in axes.patches if to_hex(bar.get_edgecolor()) == OUTLINE]
    spans = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in outlined)
    assert np.allclose(spans, [(-HEIGHT / 2, 1 + HEIGHT / 2), (3 - HEIGHT / 2, 3 + HEIGHT / 2)])
    assert [text.get_text() for text in axes.texts] == ["3", "3"]


@pytest.mark.parametrize("ranks", [2, 4, 96])
def test_the_picture_is_written(tmp_path, ranks):
    lengths = [1000, *[40] * 2 * ranks]
    problem = Problem.of(lengths, ranks, 1024 // ranks + 64, "free", COST)
    plans = [TitledPlan(name, PLANNERS[name](problem)) for name in ("static", "hybrid")]
    plot_stacked(plans, lengths, COST, "title", tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 10_000
