"""Static context parallelism: the ring size that a user would set, and the best in hindsight."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.errors import UserError
from megascale.planner import static
from megascale.planner.cost import CostModel
from megascale.planner.lengths import draw_lengths
from megascale.planner.placing import complete
from megascale.planner.problem import OffloadModel, Problem
from megascale.planner.static import plan_static, plan_static_balanced, plan_static_best

K = 1024
COST = CostModel(
    a=5.128e-9,
    b=1.84e-4,
    fixed=0.01,
    latency=0.003,
    transfer_intra=16e-6,
    transfer_inter=50e-6,
)
TOKENS_ONLY = CostModel(a=0.0, b=1.0)
ALL = [plan_static, plan_static_balanced, plan_static_best]


@pytest.mark.parametrize(
    ("longest", "num_ranks", "size"),
    [(10, 12, 1), (11, 12, 2), (35, 12, 4), (41, 12, 6), (61, 12, 12), (35, 10, 5), (11, 7, 7)],
)
def test_the_smallest_divisor_that_holds_the_longest(
    longest: int, num_ranks: int, size: int
) -> None:
    for planner in (plan_static, plan_static_balanced):
        plan = planner(Problem.of([3, longest], num_ranks, 10, "free", COST))
        used = [ring for ring in plan.rings if ring.sequences]
        assert {len(ring.ranks) for ring in used} == {size}
        assert all(ring.ranks[0] % size == 0 for ring in used)


def test_packing_is_next_fit_and_groups_take_turns() -> None:
    """Packs of at most 20 tokens: 4+16 is full; 9 does not look back for room."""
    lengths = [4, 16, 15, 9, 1, 9, 20, 2]
    plan = plan_static(Problem.of(lengths, 4, 10, "free", COST))
    assert [(ring.ranks, ring.sequences) for ring in plan.rings] == [
        ((0, 1), (0, 1)),
        ((2, 3), (2,)),
        ((0, 1), (3, 4, 5)),
        ((2, 3), (6,)),
        ((0, 1), (7,)),
    ]


def test_balanced_packs_best_fit_and_feeds_the_least_busy_group() -> None:
    """Packs 9+1, 8+2, 7+3 and 6 of ten tokens; the 6 goes to a group that has only one."""
    plan = plan_static_balanced(Problem.of([6, 1, 7, 2, 8, 3, 9], 3, 10, "free", TOKENS_ONLY))
    assert [(ring.ranks, ring.sequences) for ring in plan.rings] == [
        ((0,), (6, 1)),
        ((1,), (4, 3)),
        ((2,), (2, 5)),
        ((0,), (0,)),
    ]
    assert plan.predicted_s == 16.0


def test_hindsight_chooses_the_ring_by_time() -> None:
    """A giant on all ranks ends sooner than on the smallest ring that holds it."""
    problem = Problem.of([40, 1, 1], 8, 10, "free", CostModel(a=1.0, b=0.0))
    assert plan_static_balanced(problem).predicted_s == 400.0
    best = plan_static_best(problem)
    assert {len(ring.ranks) for ring in best.rings} == {8}
    assert best.predicted_s == pytest.approx((40 * 40 + 2) / 8)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    mode = draw(st.sampled_from(["free", "aligned", "lockstep"]))
    group = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 4_000_000), max_size=30))
    lengths += draw(st.lists(st.integers(1, 5000), max_size=60))
    fair = -(-max(lengths, default=1) // 30)
    return Problem.of(
        lengths,
        group * draw(st.integers(1, 10)),
        draw(st.one_of(st.integers(fair, 100_000 + fair), st.just(4_000_000))),
        mode,
        draw(st.sampled_from([COST, TOKENS_ONLY])),
        expert_group=group,
        pipeline=draw(st.integers(1, 3)) if mode == "aligned" else 1,
        offload=draw(st.sampled_from([None, OffloadModel(32, 1e5, 2e10)])),
    )


@given(problem=problems())
def test_every_plan_keeps_the_invariants_and_hindsight_wins(problem: Problem) -> None:
    try:
        problem.require_fit()
    except UserError:
        for planner in ALL:
            with pytest.raises(UserError, match="does not fit"):
                planner(problem)
        return
    plans = [planner(problem) for planner in ALL]
    for planner, plan in zip(ALL, plans, strict=True):
        plan.check(problem.lengths.tolist())
        assert len({len(ring.ranks) for ring in plan.rings if ring.sequences}) <= 1
        assert planner(problem).digest() == plan.digest()
        needs_offload = problem.lengths.max(initial=0) > problem.num_ranks * problem.capacity
        assert any(ring.offload > 0 for ring in plan.rings) == needs_offload
    assert plans[2].predicted_s <= min(plan.predicted_s for plan in plans)


@settings(max_examples=60)
@given(problem=problems())
def test_hindsight_is_the_best_of_all_divisors(problem: Problem) -> None:
    """The search stops early by a bound; here nothing does."""
    longest, ranks = int(problem.lengths.max(initial=0)), problem.num_ranks
    sizes = [c for c in range(1, ranks + 1) if ranks % c == 0 and c * problem.capacity >= longest]
    seconds = [
        complete(problem, static._placed(problem, size, pack(problem, size)), 0.0).predicted_s
        for size in sizes
        for pack in (static._in_turn, static._longest_first)
    ]
    if seconds:
        assert plan_static_best(problem).predicted_s == pytest.approx(min(seconds), rel=1e-12)


def test_a_sequence_that_fits_with_offload_only_gets_what_it_takes() -> None:
    host = OffloadModel(32, 1e5, 2e10)
    for planner in ALL:
        plan = planner(Problem.of([35, 60, 5], 4, 10, "free", COST, offload=host))
        plan.check([35, 60, 5])
        shares = {ring.sequences: ring.offload for ring in plan.rings}
        assert shares.pop((1,)) == pytest.approx((1 - 40 / 60) * 32 / 30)
        assert set(shares.values()) == {0.0}


@pytest.mark.parametrize("lengths", [[], [5], [10, 10, 10]], ids=str)
@pytest.mark.parametrize("planner", ALL)
def test_odd_cases_in_all_modes(planner, lengths: list[int]) -> None:
    for mode in ("free", "aligned", "lockstep"):
        for num_ranks in (1, 7):
            plan = planner(Problem.of(lengths, num_ranks, 10, mode, COST))
            plan.check(lengths)
            assert all(plan.rings_of(rank) for rank in range(num_ranks))


def test_balance_and_hindsight_matter_on_a_long_tail() -> None:
    """GitHub-like, 1024 ranks: 2.3, 1.1 and 1.1 times the lower bound."""
    lengths = draw_lengths("github", 32 << 20, 256 * K, seed=0)
    problem = Problem.of(lengths, 1024, 8 * K, "free", COST)
    plain, balanced, best = (planner(problem).predicted_s for planner in ALL)
    assert plain > 1.5 * balanced and best <= balanced


@pytest.mark.parametrize("planner", ALL)
def test_cluster_sized_steps_are_planned_fast(planner) -> None:
    for context in (256 * K, 8 * K):
        lengths = draw_lengths("github", None, context, 0, num_sequences=8000)
        problem = Problem.of(lengths, 12288, 8 * K, "free", COST)
        assert min(planner(problem).plan_s for _ in range(3)) < 2.0
