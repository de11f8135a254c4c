"""The neutral judge agrees with pencil and paper, with a slow simulation and with the planner."""

import json
import math
import subprocess
import sys
from pathlib import Path

import chunk_plans
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import judge
from judge_bounds import lower_bound_s, pipeline_bound_s
from processor_time import processor_s
from test_chunk_plans import BROKEN
from test_chunk_plans import plan_of as chunked_plan

from megascale.planner import CostModel, Placed, Problem, complete, step_s, timeline
from megascale.planner import chunk_rules as plan_rules

TOOLS = Path(__file__).parents[2] / "tools"
COST = {
    "a": 0.01,
    "b": 1.0,
    "fixed": 2.0,
    "latency": 0.5,
    "transfer_intra": 0.25,
    "transfer_inter": 0.75,
    "node_size": 2,
}


def plan_of(rings, num_ranks=2, mode="free", capacity=100, **others):
    """The public JSON of (ranks, sequences, index) in execution order."""
    return {
        "num_ranks": num_ranks,
        "mode": mode,
        "capacity": capacity,
        "rings": [
            {"id": i, "ranks": r, "sequences": s, "offload": 0.0, "index": k}
            for i, (r, s, k) in enumerate(rings)
        ],
    } | others


def test_one_ring_by_hand():
    within = judge(plan_of([([0, 1], [0, 1], 0)], 4), [40, 20], COST)
    # 2 + 0.5 log2(2) + (0.01 (1600 + 400) + 1 * 60 + 0.25 * 60) / 2
    assert within.free_s == pytest.approx(2.5 + (20 + 60 + 15) / 2)
    across = judge(plan_of([([1, 2], [0, 1], 0)], 4), [40, 20], COST)
    assert across.free_s == pytest.approx(2.5 + (20 + 60 + 45) / 2)
    three = judge(plan_of([([0, 3, 1], [0, 1], 0)], 4), [40, 20], COST)
    assert three.free_s == pytest.approx(2 + 0.5 * math.log2(3) + (20 + 60 + 45) / 3)
    assert within.problems == across.problems == three.problems == ()


def test_three_readings_by_hand():
    cost = dict.fromkeys(COST, 0.0) | {"b": 1.0, "node_size": 2}
    rings = [([0], [0], 0), ([1], [1], 0), ([0], [2], 1), ([1], [3], 1)]
    verdict = judge(plan_of(rings), [9, 3, 3, 6], cost, pipeline=2)
    assert verdict.problems == ()
    assert verdict.free_s == pytest.approx(12)
    assert verdict.lock_s == pytest.approx(9 + 6)
    # Rank 0, stage 1: waits for forward 0 (3 s), then 3 + 6 + 1 + 2; stage 0 ends with backward 0
    # from 12 on (6 s) and backward 1 (2 s).
    assert verdict.pipeline_s == pytest.approx(20)


def test_a_ring_waits_for_its_last_rank():
    cost = dict.fromkeys(COST, 0.0) | {"b": 1.0, "node_size": 2}
    verdict = judge(plan_of([([0], [0], 0), ([0, 1], [1], 1)]), [9, 4], cost, pipeline=1)
    assert verdict.free_s == verdict.pipeline_s == pytest.approx(11)
    assert verdict.lock_s == pytest.approx(11)
    assert verdict.mode_s("free") == verdict.free_s and verdict.mode_s("lockstep") == verdict.lock_s


def test_orders_that_deadlock_one_forward_one_backward_take_for_ever():
    """Stage 0: rank 0 runs backward 0 before forward 2, which rank 1 runs before backward 0."""
    rings = [([0, 1], [0], 0), ([0], [1], 1), ([0, 1], [2], 2)]
    verdict = judge(plan_of(rings), [5] * 3, COST, pipeline=2)
    assert verdict.pipeline_s == math.inf
    assert math.isfinite(verdict.free_s) and math.isfinite(verdict.lock_s)
    aligned = judge(plan_of(rings, mode="aligned"), [5] * 3, COST)
    assert any("index" in line for line in aligned.problems)


def broken_plans():
    good = [([0], [0, 1], 0), ([1], [2], 0), ([0, 1], [3], 1)]
    yield "not placed: 3", plan_of(good[:2])
    yield "more than once: 0", plan_of(good[:2] + [([0, 1], [3, 0], 1)])
    yield "sequence that none of 4 is: 7", plan_of(good[:2] + [([0, 1], [3, 7], 1)])
    yield "rank that none of 2 is: 2", plan_of(good[:2] + [([0, 2], [3], 1)])
    yield "rank that none of 2 is: -1", plan_of(good[:2] + [([0, -1], [3], 1)])
    yield "ring without ranks: 2", plan_of(good[:2] + [([], [3], 1)])
    yield "rank twice: 2", plan_of(good[:2] + [([0, 0], [3], 1)])
    yield "above its capacity: 2", plan_of(good, capacity=14)
    yield "does not increase on rank: 0", plan_of(good[:2] + [([0, 1], [3], 0)])
    yield "before, ring: 2", plan_of(good[:2] + [([0, 1], [3], 2)], mode="aligned")
    yield "another count", plan_of(good + [([0], [], 2)], mode="lockstep")
    yield "mode waltz", plan_of(good, mode="waltz")
    swapped = plan_of(good)
    swapped["rings"][1]["id"] = 0
    yield "not above the one before: 0", swapped
    offloaded = plan_of(good)
    offloaded["rings"][1]["offload"] = 1.5
    yield "offload outside 0 to 1: 1", offloaded


@pytest.mark.parametrize("line, plan", broken_plans(), ids=lambda value: str(value)[:24])
def test_every_broken_rule_is_named(line, plan):
    verdict = judge(plan, [7, 3, 10, 30], COST)
    assert any(line in problem for problem in verdict.problems), verdict.problems
    does_the_step = not any("sequence" in line or "rank t" in line for line in verdict.problems)
    assert math.isfinite(verdict.free_s) == (does_the_step and "without" not in line)


def test_what_differs_between_modes_is_no_problem():
    uneven = [([0], [0], 0), ([1], [1], 0), ([0], [2], 1)]
    for mode in ("free", "aligned"):
        assert judge(plan_of(uneven, mode=mode), [1, 1, 1], COST).problems == ()
    by_groups = plan_of(uneven, mode="lockstep", expert_group=1)
    assert judge(by_groups, [1, 1, 1], COST).problems == ()


def test_offload_raises_the_capacity_of_all_layers_but_two():
    plan = plan_of([([0], [0], 0)], num_ranks=1, stage_layers=4)
    for offload, tokens, fits in ((0.0, 100, True), (0.0, 101, False), (1.0, 200, True)):
        plan["rings"][0]["offload"] = offload
        assert (judge(plan, [tokens], COST).problems == ()) == fits
    plan["rings"][0]["offload"] = 1.0
    assert judge(plan, [201], COST).problems
    assert judge(plan | {"stage_layers": 2}, [101], COST).problems


def test_bound_by_hand():
    even = lower_bound_s([10] * 8, 4, 100, COST)
    assert even == pytest.approx((8 * (1 + 10)) / 4 + 2.0 * 80 / 400)
    # 90 tokens need two ranks of 50: within a node, and latency for 90 of the 100 tokens.
    memory = lower_bound_s([90] * 4, 4, 50, COST)
    work = 0.01 * 8100 + (1.25 + 0.5 / 50) * 90
    assert memory == pytest.approx(4 * work / 4 + 2.0 * 360 / 200)
    cheap = COST | {"transfer_inter": 0.0, "latency": 0.0}
    longest = lower_bound_s([90], 4, 90, cheap)
    assert longest == pytest.approx(2 + (81 + 90) / 4)
    assert lower_bound_s([], 4, 90, COST) == 0
    assert pipeline_bound_s([90], 4, 90, cheap, 1.0, 3) == pytest.approx(3 * longest)
    assert pipeline_bound_s([10] * 8, 4, 100, COST, 1.0, 1) == pytest.approx(even)
    many = lower_bound_s([10] * 800, 4, 100, COST)
    assert pipeline_bound_s([10] * 800, 4, 100, COST, 1.0, 3) == pytest.approx(many + 2 * 2.0)


def test_foreign_cost_keys_are_refused():
    with pytest.raises(ValueError, match="pass_inter"):
        judge(plan_of([([0], [0], 0)]), [1], COST | {"pass_inter": 1.0})


@st.composite
def random_plans(draw):
    """(problem, plan) of random rings on random ranks, in any mode."""
    num_ranks = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=14))
    placed, left = [], list(range(len(lengths)))
    while left:
        take = draw(st.integers(1, 3))
        ranks = draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, unique=True))
        placed.append(Placed(ranks, left[:take]))
        left = left[take:]
    mode = draw(st.sampled_from(["free", "aligned", "lockstep"]))
    stages = draw(st.integers(1, 5))
    problem = Problem.of(lengths, num_ranks, 200, mode, CostModel(**COST), pipeline=stages)
    return problem, complete(problem, placed, 0.0)


@settings(max_examples=200)
@given(random_plans())
def test_judge_and_planner_agree(case):
    """Two codes that share nothing but the formula."""
    problem, plan = case
    verdict = judge(json.loads(plan.to_bytes()), problem.lengths, COST, problem.pipeline)
    assert verdict.problems == ()
    free = timeline(plan, problem.lengths, problem.cost).total_s
    if problem.mode == "lockstep":
        assert verdict.lock_s == pytest.approx(free)
    else:
        assert verdict.free_s == pytest.approx(free)
    if problem.mode == "aligned":
        assert verdict.pipeline_s == pytest.approx(plan.predicted_s)
        staged = step_s(plan, problem.lengths, problem.cost, problem.pipeline)
        assert verdict.pipeline_s == pytest.approx(staged)
    assert verdict.lower_bound_s <= verdict.free_s * (1 + 1e-9)
    assert verdict.pipeline_bound_s <= verdict.pipeline_s * (1 + 1e-9)
    assert verdict.free_s <= verdict.lock_s * (1 + 1e-9)


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    num_ranks=st.integers(1, 8),
    terms=st.tuples(*[st.sampled_from([0.0, 0.01, 1.0, 9.0]) for _ in range(6)]),
    data=st.data(),
)
def test_no_valid_plan_is_faster_than_the_bound(lengths, num_ranks, terms, data):
    """Also where passing data between nodes is cheaper than within one."""
    cost = dict(zip(COST, terms)) | {"node_size": 3}
    capacity, rings = -(-max(lengths) // num_ranks), []
    lengths = lengths * 2
    left = list(range(len(lengths)))
    while left:
        taken = [left.pop()]
        size = data.draw(st.integers(-(-lengths[taken[0]] // capacity), num_ranks))
        ranks = data.draw(st.permutations(range(num_ranks)))[:size]
        while left and sum(lengths[i] for i in [*taken, left[-1]]) <= capacity * size:
            taken.append(left.pop())
        rings.append((ranks, taken, len(rings)))
    verdict = judge(plan_of(rings, num_ranks, capacity=capacity), lengths, cost)
    assert verdict.problems == ()
    assert verdict.lower_bound_s <= verdict.free_s * (1 + 1e-9)


def ring_s(plan, ring, lengths):
    held = [lengths[i] for i in ring["sequences"]]
    size = len(ring["ranks"])
    one_node = len({rank // COST["node_size"] for rank in ring["ranks"]}) == 1
    kappa = 0.0 if size == 1 else COST["transfer_intra" if one_node else "transfer_inter"]
    work = sum(COST["a"] * s * s + (COST["b"] + kappa) * s for s in held)
    return COST["fixed"] + COST["latency"] * math.log2(size) + work / size


def simulate(plan, lengths, stages):
    """1F1B by asking every rank of every stage in turn whether its next task can begin."""
    rings = plan["rings"]
    queues, at, free_s = {}, {}, {}
    for rank in range(plan["num_ranks"]):
        own = [i for i, ring in enumerate(rings) if rank in ring["ranks"]]
        for stage in range(stages):
            tasks = own[: max(0, stages - 1 - stage)]
            tasks = [("F", i) for i in tasks]
            rest = own[len(tasks) :]
            backward = iter(own)
            for i in rest:
                tasks += [("F", i), ("B", next(backward))]
            queues[stage, rank] = tasks + [("B", i) for i in backward]
            at[stage, rank], free_s[stage, rank] = 0, 0.0
    done = {}
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            for i, ring in enumerate(rings):
                places = [(stage, rank) for rank in ring["ranks"]]
                heads = {(queues[p][at[p]] if at[p] < len(queues[p]) else None) for p in places}
                if len(heads) > 1 or heads & {None} or next(iter(heads))[1] != i:
                    continue
                kind = next(iter(heads))[0]
                before = {"F": ("F", stage - 1, i), "B": ("B", stage + 1, i)}[kind]
                if 0 <= before[1] < stages and before not in done:
                    continue
                begin = max([done.get(before, 0.0)] + [free_s[p] for p in places])
                share = 1 / 3 if kind == "F" else 2 / 3
                done[kind, stage, i] = begin + share * ring_s(plan, ring, lengths)
                for p in places:
                    at[p], free_s[p] = at[p] + 1, done[kind, stage, i]
                moved = True
    return max(free_s.values()) if len(done) == 2 * stages * len(rings) else math.inf


@settings(max_examples=200)
@given(random_plans(), st.integers(1, 4))
def test_judge_agrees_with_a_slow_simulation_in_any_mode(case, stages):
    problem, plan = case
    value = json.loads(plan.to_bytes())
    verdict = judge(value, problem.lengths, COST, stages)
    assert verdict.pipeline_s == pytest.approx(simulate(value, problem.lengths.tolist(), stages))
    if problem.mode != "free":
        assert math.isfinite(verdict.pipeline_s)


def test_command_line(tmp_path):
    plan = plan_of([([0], [0], 0), ([1], [1], 0)])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    for lengths, code in (("9\n8\n", 0), ("9\n8\n7\n", 1)):
        (tmp_path / "lengths").write_text(lengths)
        names = [str(tmp_path / name) for name in ("plan.json", "lengths", "cost.json")]
        done = subprocess.run(
            [sys.executable, str(TOOLS / "judge.py"), *names], capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        value = json.loads(done.stdout)
        assert value["free_s"] == (math.inf if code else pytest.approx(2 + 0.81 + 9))
        assert bool(value["problems"]) == bool(code)


def test_judge_knows_nothing_of_the_planner():
    script = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import judge
print([name for name in sys.modules if name.startswith(("megascale", "torch", "scipy"))])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_cluster_is_judged_in_a_second():
    rng = np.random.default_rng(0)
    lengths = np.minimum(8192, rng.lognormal(7, 1.75, 60_000)).astype(int) + 1
    ranks = np.arange(12_288)
    rings = [([int(rank)], [], 0) for rank in ranks]
    for i in range(len(lengths)):
        rings[i % len(ranks)][1].append(i)
    everyone = plan_of(rings, 12_288, "lockstep", 1 << 20)
    assert processor_s(lambda: judge(everyone, lengths, COST)) < 1.0
    assert judge(everyone, lengths, COST).problems == ()


CHUNKS = {
    "num_ranks": 2, "mode": "aligned", "capacity": 60, "pipeline": 2,
    "rings": [
        {"id": 0, "ranks": [0, 1], "sequences": [0], "offload": 0.0, "index": 0,
         "group": 0, "chunk": 0, "chunks": 2, "spans": [[0, 60]]},
        {"id": 1, "ranks": [0, 1], "sequences": [0], "offload": 0.0, "index": 1,
         "group": 0, "chunk": 1, "chunks": 2, "spans": [[60, 100]]},
    ],
}  # fmt: skip


def test_chunks_by_hand():
    """The second chunk's attention is that of the trapezoid: 0.01 (100^2 - 60^2)."""
    verdict = judge(CHUNKS, [100], COST, pipeline=2)
    assert verdict.problems == ()
    first = 2.5 + (0.01 * 3600 + 60 + 0.25 * 60) / 2
    second = 2.5 + (0.01 * 6400 + 40 + 0.25 * 40) / 2
    # stage 0: F0 F1 .. B1 .. B0; stage 1: F0 F1 B1 B0
    last = max(first + second, 2 * first) / 3 + second / 3 + second * 2 / 3
    assert verdict.pipeline_s == pytest.approx(last + max(first, second) * 2 / 3 + first * 2 / 3)
    assert verdict.pipeline_bound_s == pytest.approx(verdict.lower_bound_s + 2)


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(2, 4))
@settings(max_examples=30)
def test_chunks_as_the_planner_times_and_checks_them(seed, num_ranks, stages):
    plan = chunk_plans.random_plan(np.random.default_rng(seed), num_ranks, stages)
    value = json.loads(json.dumps(plan.to_json()))
    verdict = judge(value, plan.lengths, COST, stages)
    assert verdict.problems == ()
    seconds = step_s(plan, plan.lengths, CostModel(**COST), stages)
    assert verdict.pipeline_s == pytest.approx(seconds)
    if plan.pipeline > 1 and plan.capacity > 1:
        full = plan_rules.peak_tokens(plan.rings, plan.lengths, num_ranks, stages).max()
        tight = judge(value | {"capacity": int(full) // stages - 1}, plan.lengths, COST, stages)
        assert tight.problems


@pytest.mark.parametrize("problem", sorted(BROKEN))
def test_broken_chunks_are_found(problem):
    value = json.loads(json.dumps(chunked_plan(BROKEN[problem], capacity=20).to_json()))
    verdict = judge(value, [40, 6, 7], COST, pipeline=2)
    assert verdict.problems and all("\n" not in line for line in verdict.problems)
