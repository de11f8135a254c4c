"""Plans keep their invariants, stay near the bound, and are the same bytes everywhere."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pictures
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from processor_time import processor_s

from megascale.errors import UserError
from megascale.planner import (
    CostModel,
    PlanError,
    Problem,
    Ring,
    StepPlan,
    plan_longest_first,
    timeline,
)
from megascale.planner.gantt import plot_gantt, text_gantt

COST = CostModel(a=1e-9, b=1e-5, fixed=2e-3, latency=1e-4, transfer_intra=1e-8, node_size=4)
LENGTHS = st.lists(st.integers(1, 4_000_000), max_size=60)


def longest_first(
    lengths: object, num_ranks: int, capacity: int, mode: str, cost: CostModel, group: int = 1
) -> StepPlan:
    return plan_longest_first(
        Problem.of(lengths, num_ranks, capacity, mode, cost, expert_group=group)
    )


def ring(id: int, ranks: list[int], sequences: list[int], index: int, offload: float = 0) -> Ring:
    return Ring(id, tuple(ranks), tuple(sequences), offload, index)


def plan_of(rings: list[Ring], num_ranks: int = 2, mode: str = "free", group: int = 1) -> StepPlan:
    return StepPlan(num_ranks, mode, 10, 1.0, 1.0, 0.0, tuple(rings), group)


@given(lengths=LENGTHS, num_groups=st.integers(1, 9), group=st.integers(1, 7), data=st.data())
def test_every_plan_keeps_the_invariants(
    lengths: list[int], num_groups: int, group: int, data: st.DataObject
) -> None:
    mode = data.draw(st.sampled_from(["free", "aligned", "lockstep"]))
    capacity = max(lengths, default=1) + data.draw(st.integers(0, 5000))
    num_ranks = num_groups * group
    plan = longest_first(lengths, num_ranks, capacity, mode, COST, group)
    plan.check(lengths)
    assert plan.expert_group == (group if mode == "lockstep" else 1)
    assert all(plan.rings_of(rank) for rank in range(num_ranks))
    assert all(len(one.ranks) == 1 for one in plan.rings)
    assert plan.predicted_s == pytest.approx(timeline(plan, lengths, COST).total_s)
    assert plan.predicted_s >= plan.lower_bound_s * (1 - 1e-9)
    again = longest_first(lengths, num_ranks, capacity, mode, COST, group)
    assert again.digest() == plan.digest()


@given(lengths=st.lists(st.integers(1, 3000), min_size=1), num_ranks=st.integers(1, 12))
def test_no_emptier_micro_batches_than_capacity_asks_for(
    lengths: list[int], num_ranks: int
) -> None:
    """First fit never leaves a rank two micro-batches that one could hold."""
    plan = longest_first(lengths, num_ranks, 3000, "free", COST)
    for rank in range(num_ranks):
        held = [sum(lengths[i] for i in one.sequences) for one in plan.rings_of(rank)]
        assert all(a + b > 3000 for i, a in enumerate(held) for b in held[:i])


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=200), ranks=st.integers(1, 16))
def test_free_plan_is_within_grahams_bound(lengths: list[int], ranks: int) -> None:
    """The rank that ends last was the least busy before its last sequence, which is no longer
    than the (ranks + 1)-th longest: at most the even share plus that one (Graham, 1969)."""
    cost = replace(COST, fixed=0.0)
    plan = longest_first(lengths, ranks, sum(lengths), "free", cost)
    seconds = np.sort(cost.compute_s(lengths))[::-1]
    last = seconds[ranks] if len(lengths) > ranks else 0.0
    limit = max(seconds[0], seconds.sum() / ranks + last * (1 - 1 / ranks))
    assert plan.predicted_s <= limit * (1 + 1e-9)


def test_lower_bound_counts_compute_capacity_and_the_longest() -> None:
    cost = CostModel(a=0.0, b=1.0, fixed=10.0)
    assert longest_first([6, 2], 2, 6, "free", cost).lower_bound_s == 14.0  # on a ring of 2
    assert longest_first([5] * 8, 2, 10, "free", cost).lower_bound_s == 40.0
    assert longest_first([], 3, 10, "free", cost).lower_bound_s == 10.0


def test_opening_a_micro_batch_counts_as_work() -> None:
    """Rank 1 has less to compute (11^2 + 10^2 < 20^2) but in one micro-batch more."""
    cost = CostModel(a=1.0, b=0.0, fixed=300.0)
    plan = longest_first([20, 11, 10, 5], 2, 20, "free", cost)
    assert [one.sequences for one in plan.rings_of(0)] == [(0,), (3,)]
    assert [one.sequences for one in plan.rings_of(1)] == [(1,), (2,)]


def test_long_tail_is_balanced() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(6, 1.2, 4000), 1, 8192).astype(int)
    plan = longest_first(lengths, 16, 8192, "free", COST)
    assert plan.predicted_s < 1.02 * plan.lower_bound_s


def test_too_long_a_sequence_names_the_capacity_that_fits() -> None:
    with pytest.raises(UserError, match="planner.capacity_tokens=300 or"):
        longest_first([5, 300], 2, 200, "free", COST)
    longest_first([5, 300], 2, 300, "free", COST)


def test_length_below_one_and_odd_groups_are_programmer_errors() -> None:
    with pytest.raises(ValueError, match="a sequence has 0 tokens"):
        longest_first([5, 0], 2, 200, "free", COST)
    with pytest.raises(ValueError, match="expert_group = 2 must"):
        longest_first([5], 3, 200, "lockstep", COST, 2)


def test_cluster_sized_step_is_planned_in_a_second() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(6, 1.5, 50_000), 1, 32768).astype(int)
    assert processor_s(lambda: longest_first(lengths, 1024, 32768, "lockstep", COST, 64)) < 1.0


@given(lengths=LENGTHS)
def test_bytes_and_json_round_trip(lengths: list[int]) -> None:
    plan = longest_first(lengths, 5, 4_000_000, "lockstep", COST, 5)
    assert StepPlan.from_bytes(plan.to_bytes()) == plan
    assert StepPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_digest_covers_everything_but_the_planning_time() -> None:
    plan = longest_first([3, 4, 5], 2, 10, "free", COST)
    assert replace(plan, plan_s=9.0).digest() == plan.digest()
    swapped = replace(plan.rings[0], sequences=plan.rings[0].sequences[::-1] + (7,))
    for other in (
        replace(plan, capacity=11),
        replace(plan, predicted_s=3.0),
        replace(plan, rings=(swapped, *plan.rings[1:])),
    ):
        assert other.digest() != plan.digest()


def test_public_format_of_the_json() -> None:
    plan = longest_first([3, 4], 2, 10, "free", COST).to_json()
    names = "num_ranks mode capacity predicted_s lower_bound_s plan_s rings"
    assert set(names.split()) <= set(plan)
    assert plan["rings"][0] == {
        "id": 0, "ranks": (0,), "sequences": (1,), "offload": 0.0, "index": 0,
    }  # fmt: skip


GOOD = [ring(0, [0], [0], 0), ring(1, [1], [1], 0), ring(2, [0, 1], [2], 1)]


def test_a_good_plan_passes() -> None:
    plan_of(GOOD).check([10, 10, 20])
    plan_of(GOOD, mode="aligned").check([10, 10, 20])
    plan_of(GOOD, mode="lockstep", group=2).check([10, 10, 20])


@pytest.mark.parametrize(
    ("rings", "problem"),
    [
        (GOOD[:2], "2 sequences are placed"),
        ([*GOOD, ring(3, [0], [2], 2)], "4 sequences are placed, 3 of them different"),
        ([*GOOD[:2], ring(2, [0, 1], [3], 1)], "missing: \\[2\\]"),
        ([GOOD[1], GOOD[0], GOOD[2]], "ring 0 follows ring 1"),
        ([GOOD[0], replace(GOOD[1], id=0), GOOD[2]], "ring 0 follows ring 0"),
        ([*GOOD[:2], ring(2, [1], [2], 1)], "holds 20 tokens on 1 ranks of 10"),
        ([*GOOD[:2], ring(2, [1, 1], [2], 1)], "has a rank twice"),
        ([*GOOD[:2], ring(2, [1, 2], [2], 1)], "has ranks \\(1, 2\\) of 2"),
        ([*GOOD[:2], ring(2, [], [2], 1)], "has ranks \\(\\) of 2"),
        ([*GOOD[:2], ring(2, [0, 1], [2], 1, offload=1.5)], "offloads 1.5"),
        ([*GOOD[:2], ring(2, [0, 1], [2], 0)], "micro-batch indices \\[0, 0\\]"),
    ],
)
def test_broken_plans_are_named(rings: list[Ring], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        plan_of(rings).check([10, 10, 20])


def test_modes_ask_for_aligned_indices_and_equal_counts() -> None:
    shifted = [ring(0, [0], [0], 0), ring(1, [0, 1], [1], 1)]
    plan_of(shifted).check([10, 20])
    with pytest.raises(PlanError, match="rank 1 has gaps: \\[1\\]"):
        plan_of(shifted, mode="aligned").check([10, 20])
    uneven = [ring(0, [0], [0], 0), ring(1, [1], [1], 0), ring(2, [0], [2], 1)]
    plan_of(uneven, mode="aligned").check([10, 10, 10])
    with pytest.raises(PlanError, match="ranks from 0 run \\[2, 1\\] micro-batches"):
        plan_of(uneven, mode="lockstep", group=2).check([10, 10, 10])
    with pytest.raises(PlanError, match="expert groups of 2 in free mode"):
        plan_of(GOOD, group=2).check([10, 10, 20])


def test_timeline_waits_for_rings_and_for_expert_groups() -> None:
    cost = CostModel(a=0.0, b=1.0, fixed=1.0)
    rings = [ring(0, [0], [0], 0), ring(1, [1], [1], 0), ring(2, [0, 1], [2], 1)]
    times = timeline(plan_of(rings), [9, 4, 10], cost)
    assert times.begin_s.tolist() == [0, 0, 10] and times.end_s.tolist() == [10, 5, 16]
    assert times.busy_s.tolist() == [16, 11] and times.total_s == 16
    assert times.imbalance == pytest.approx(16 / 13.5)
    single = [*rings[:2], ring(2, [0], [2], 1), ring(3, [1], [], 1)]
    locked = timeline(plan_of(single, mode="lockstep", group=2), [9, 4, 10], cost)
    assert locked.begin_s.tolist() == [0, 0, 10, 10] and locked.total_s == 21
    free = timeline(plan_of(single), [9, 4, 10], cost)
    assert free.begin_s.tolist() == [0, 0, 10, 5]


def test_ring_seconds_are_the_documented_formula() -> None:
    cost = CostModel(2.0, 3.0, 5.0, 7.0, 11.0, 13.0, node_size=2)
    assert cost.ring_s([2, 4], [1]) == 5 + 2 * 20 + 3 * 6
    assert cost.ring_s([2, 4], [0, 1]) == 5 + 7 + (2 * 20 + 3 * 6) / 2 + 11 * 3
    assert cost.ring_s([2, 4], [1, 2]) == 5 + 7 + (2 * 20 + 3 * 6) / 2 + 13 * 3
    assert cost.ring_s([2, 4], [0, 1, 2, 3]) == 5 + 14 + (2 * 20 + 3 * 6) / 4 + 13 * 1.5
    assert cost.ring_s([], [0]) == 5


FULL_COST = {
    "a": 1e-9, "b": 1e-5, "fixed": 0.002, "latency": 0, "transfer_intra": 1e-8,
    "transfer_inter": 1e-7, "node_size": 8,
}  # fmt: skip


def test_cost_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "COST.json"
    path.write_text(json.dumps(FULL_COST))
    cost = CostModel.load(path)
    assert (cost.a, cost.fixed, cost.node_size, cost.calibrated) == (1e-9, 0.002, 8, True)
    assert not CostModel.from_flops(1e9, 1e5).calibrated


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "not JSON"),
        ("[1]", "must be an object with keys a, b, fixed"),
        (json.dumps({**FULL_COST, "c": 1}), "unknown key c; keys: a, b, fixed"),
        (json.dumps({k: v for k, v in FULL_COST.items() if k != "b"}), "b missing"),
        (json.dumps({**FULL_COST, "a": "1"}), "a = '1' must be a number from 0 to 1,000,000"),
        (json.dumps({**FULL_COST, "b": -1}), "b = -1 must be"),
        (json.dumps({**FULL_COST, "b": float("nan")}), "NaN: no finite number"),
        (json.dumps({**FULL_COST, "node_size": 0}), "node_size = 0 must be a whole number from 1"),
        (json.dumps({**FULL_COST, "node_size": 1.5}), "node_size = 1.5 must be a whole number"),
        (json.dumps({**FULL_COST, "a": 10**400}), "no finite number that a float can hold"),
        (json.dumps({**FULL_COST, "a": 1e308}), "a = 1e.308 must be"),
        (
            json.dumps({**FULL_COST, "node_size": 10**30}),
            "node_size = 1e.30 must be",
        ),
    ],
)
def test_bad_cost_file_is_one_clear_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "COST.json"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        CostModel.load(path)


def test_text_gantt_shows_times_to_scale() -> None:
    cost = CostModel(a=0.0, b=1.0)
    plan = longest_first([60, 40, 30], 2, 100, "free", cost)
    lines = text_gantt(plan, [60, 40, 30], cost, width=70).splitlines()
    assert lines[0] == f"rank     0 [{'#' * 59}     |       86%   1 mb"
    assert lines[1] == f"rank     1 [{'=' * 69}  100%   1 mb"
    with_padding = longest_first([60], 2, 100, "lockstep", COST, 2)
    assert "[." in text_gantt(with_padding, [60], COST).splitlines()[1]


def test_text_gantt_of_many_ranks_shows_some_busiest_first() -> None:
    lengths = list(range(1, 101))
    lines = text_gantt(longest_first(lengths, 100, 100, "free", COST), lengths, COST)
    assert lines.splitlines()[0].startswith("rank     0 ")
    assert lines.splitlines()[-1] == "(16 of 100 ranks, busiest first)"


@pytest.mark.parametrize("num_ranks", [1, 70])
def test_gantt_picture_is_written(tmp_path: Path, num_ranks: int) -> None:
    lengths = [100, 100, 50, 3]
    plan = longest_first(lengths, num_ranks, 200, "free", COST)
    with pictures.drawn_figures() as drawn:
        plot_gantt(plan, lengths, COST, tmp_path / "plan.png", "web, code")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    pictures.require_readable(drawn[0])
    assert any(
        text.startswith("One step of web, code\n") for text, _ in pictures.texts_of(drawn[0])
    )


def test_rings_of_a_gantt_picture_have_their_size_and_one_bar_for_neighbours(tmp_path) -> None:
    rings = (Ring(0, (0, 1, 3), (0,), 0.0, 0), Ring(1, (2,), (1,), 0.0, 0))
    plan = StepPlan(4, "free", 1000, 1.0, 1.0, 0.0, rings)
    with pictures.drawn_figures() as drawn:
        plot_gantt(plan, [3000, 500], COST, tmp_path / "plan.png")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text().isdigit()] == ["3", "3"]
    outlines = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    np.testing.assert_allclose(outlines, [(-0.41, 1.41), (2.59, 3.41)])
    (bars,) = axes.collections
    rows = [(path.vertices[:, 1].min(), path.vertices[:, 1].max()) for path in bars.get_paths()]
    np.testing.assert_allclose(rows, [(-0.41, 1.41), (2.59, 3.41), (1.59, 2.41)])


@pytest.mark.parametrize("lengths", [[256] * 8, [16, 1000, 70000], [5_000_000, 100]])
def test_a_colour_of_a_gantt_picture_is_the_same_length_in_all_pictures(tmp_path, lengths) -> None:
    plan = longest_first(lengths, 2, 10_000_000, "free", COST)
    with pictures.drawn_figures() as drawn:
        plot_gantt(plan, lengths, COST, tmp_path / "plan.png")
    axes, bar = drawn[0].axes
    assert bar.get_ylim() == pytest.approx((2**8, 2**18))
    ticks = [label.get_text() for label in bar.get_yticklabels()]
    assert ticks == ["256", "1,024", "4,096", "16,384", "65,536", "262,144"]
    (bars,) = axes.collections
    for ring, colour in zip(plan.rings, bars.get_facecolors(), strict=True):
        longest = max(lengths[i] for i in ring.sequences)
        part = np.clip((math.log2(longest) - 8) / (18 - 8), 0, 1)
        np.testing.assert_allclose(colour, colormaps["viridis"](part), atol=0.01)


def test_planner_needs_numpy_only() -> None:
    code = (
        "import sys, megascale.planner, megascale.planner.gantt\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'megatron'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
