"""The peers' plans are plans, and what they break, raise or run into is reported as such."""

import itertools
import json
import math
import os
import time

import bench_planner
import numpy as np
import peers
import pictures
import planner_results
import pytest
from bench_planner import Job, Row, Scenario, corpus_lengths, in_process
from hypothesis import given
from hypothesis import strategies as st
from judge import judge
from peers import karmarkar_karp, plan_megatron_core, plan_verl_kk
from PIL import Image

from megascale.errors import UserError
from megascale.planner import CostModel, OffloadModel, Problem, find_planner
from megascale.planner.peers.dhp import Pack, plan_dhp, share_ranks
from megascale.planner.peers.longest_first_rings import (
    plan_longest_first_rings,
    plan_longest_first_rings_best,
)
from megascale.planner.peers.wlb_llm import plan_wlb_llm

COST = bench_planner.COST


def problem_of(lengths, num_ranks, capacity, mode="free"):
    return Problem.of(lengths, num_ranks, capacity, mode, CostModel(**COST))


def verdict_on(plan, lengths):
    return judge(json.loads(plan.to_bytes()), lengths, COST)


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    num_ranks=st.integers(1, 24),
    capacity=st.integers(200, 4000),
    mode=st.sampled_from(["free", "aligned", "lockstep"]),
)
def test_static_peers_keep_all_rules_but_verl_the_capacity(lengths, num_ranks, capacity, mode):
    problem = problem_of(lengths, num_ranks, capacity, mode)
    if max(lengths) > num_ranks * capacity:
        with pytest.raises(UserError):
            plan_longest_first_rings(problem)
        return
    divisors = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    size = next(size for size in divisors if size * capacity >= max(lengths))
    for plan in (plan_longest_first_rings(problem), plan_verl_kk(problem)):
        assert {len(ring.ranks) for ring in plan.rings if ring.sequences} == {size}
        problems = verdict_on(plan, lengths).problems
        kept = [line for line in problems if "capacity" not in line]
        assert kept == []
        assert plan.rings[0].ranks and math.isfinite(plan.predicted_s)
    smallest, best = plan_longest_first_rings(problem), plan_longest_first_rings_best(problem)
    assert verdict_on(smallest, lengths).problems == verdict_on(best, lengths).problems == ()
    assert best.predicted_s <= smallest.predicted_s


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    num_ranks=st.integers(1, 24),
    capacity=st.integers(200, 4000),
    mode=st.sampled_from(["free", "aligned", "lockstep"]),
    pipeline=st.sampled_from([1, 4]),
)
def test_newer_peers_keep_all_rules(lengths, num_ranks, capacity, mode, pipeline):
    pipeline = pipeline if mode == "aligned" else 1
    cost = CostModel(**COST)
    problem = Problem.of(lengths, num_ranks, capacity, mode, cost, pipeline=pipeline)
    for planner in (plan_wlb_llm, plan_dhp):
        if max(lengths) > num_ranks * capacity:
            with pytest.raises(UserError):
                planner(problem)
            continue
        plan = planner(problem)
        assert judge(json.loads(plan.to_bytes()), lengths, COST, pipeline).problems == ()


@given(
    packs=st.lists(st.tuples(st.integers(1, 6), st.integers(100, 60_000)), min_size=1, max_size=4),
    spare=st.integers(0, 12),
    node_size=st.sampled_from([4, 8]),
)
def test_ranks_are_shared_as_by_dynamic_programming(packs, spare, node_size):
    """The paper's program, over packs and ranks; rings across nodes may be slower."""
    cost = CostModel(**{**COST, "node_size": node_size, "transfer_inter": 3e-4})
    ranks = sum(least for least, _ in packs) + spare
    problem = Problem.of([1], ranks, 100, "free", cost)
    made = []
    for least, tokens in packs:
        made.append(Pack(room=0, least=least))
        made[-1].add(0, tokens)

    def seconds(pack, size):
        return float(cost.seconds(pack.squares, pack.tokens, size, size <= node_size))

    best = [0.0] * (ranks + 1)
    for pack in made:
        best = [
            min(
                (
                    max(best[used - size], seconds(pack, size))
                    for size in range(pack.least, used + 1)
                ),
                default=math.inf,
            )
            for used in range(ranks + 1)
        ]
    sizes = share_ranks(problem, made)
    assert sum(sizes) <= ranks
    assert max(map(seconds, made, sizes)) == pytest.approx(best[ranks])


def test_packs_of_equal_work_and_unequal_tokens():
    """WLB-LLM: one sequence of 4,000 tokens weighs as much as many short ones."""
    lengths = [4000, *[100] * 90]
    plan = plan_wlb_llm(problem_of(lengths, 2, 8000))
    cost = CostModel(**COST)
    work = [cost.compute_s([lengths[i] for i in ring.sequences]).sum() for ring in plan.rings]
    assert len(work) == 2 and max(work) / min(work) < 1.02
    assert plan.rings[0].sequences == (0, *plan.rings[0].sequences[1:])


def test_short_sequences_join_a_pack_that_has_room():
    plan = plan_dhp(problem_of([1500, 400, 190], 3, 1000))
    assert sorted(ring.sequences for ring in plan.rings) == [(0, 1), (2,)]
    assert sorted(len(ring.ranks) for ring in plan.rings) == [1, 2]


@pytest.mark.parametrize("name", ["plan_longest_first_rings", "plan_longest_first_rings_best"])
@pytest.mark.parametrize("mode", ["free", "aligned", "lockstep"])
def test_a_run_can_name_rings_filled_longest_first(name, mode):
    """With offload, where the longest sequence fits all ranks no other way."""
    planner = find_planner(f"megascale.planner.peers.longest_first_rings:{name}")
    offload = OffloadModel(stage_layers=12, bytes_per_token=1e5, copy_bytes_per_s=2e10)
    lengths = [5000, 700, 300, 1000, 20]
    problem = Problem.of(lengths, 4, 1000, mode, CostModel(**COST), pipeline=2, offload=offload)
    plan = planner(problem)
    plan.check(lengths)
    assert {len(ring.ranks) for ring in plan.rings if ring.sequences} == {4}
    assert [ring.sequences for ring in plan.rings if ring.offload] == [(0,)]


def test_verl_breaks_the_capacity_and_the_judge_says_so():
    """Two micro-batches by tokens; no split of 3 x 60 into two keeps 100."""
    plan = plan_verl_kk(problem_of([60, 60, 60], 1, 100))
    assert [line[:24] for line in verdict_on(plan, [60] * 3).problems] == [
        "ring above its capacity:"
    ]


def test_differencing_by_hand():
    """The textbook case: 8 7 6 5 4 into two differ by 2 where 15 and 15 were possible."""
    parts = karmarkar_karp([8, 7, 6, 5, 4], 2, equal_counts=False)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in part) for part in parts) == [14, 16]
    assert sorted(itertools.chain(*parts)) == [0, 1, 2, 3, 4]


@given(
    weights=st.lists(st.integers(0, 100), max_size=6),
    num_parts=st.integers(1, 4),
    equal=st.booleans(),
)
def test_differencing_is_near_the_best_partition(weights, num_parts, equal):
    """At most 4/3 - 1/(3 m) of the best (Michiels et al., 2003); equal counts differ little."""
    weights += [0] * (-len(weights) % num_parts) * equal
    parts = karmarkar_karp(weights, num_parts, equal)
    assert len(parts) == num_parts
    assert sorted(itertools.chain(*parts)) == list(range(len(weights)))
    sums = [sum(weights[i] for i in part) for part in parts]
    if equal:
        assert len({len(part) for part in parts}) == 1
        assert max(sums) - min(sums) <= max(weights, default=0)
    else:
        best = min(
            max(np.bincount(where, weights, num_parts)) if where else 0
            for where in itertools.product(range(num_parts), repeat=len(weights))
        )
        assert max(sums) <= best * (4 / 3 - 1 / (3 * num_parts)) + 1e-9


def test_megatron_core_plans_powers_of_two():
    lengths = [32768, 20000, 9000, *[700] * 40]
    for mode in ("free", "aligned", "lockstep"):
        plan = plan_megatron_core(problem_of(lengths, 8, 8192, mode))
        assert verdict_on(plan, lengths).problems == ()
        assert all(len(ring.sequences) <= 1 for ring in plan.rings)
        shared = {ring.sequences: len(ring.ranks) for ring in plan.rings if ring.sequences}
        assert shared[(0,)] == 4 and shared[(1,)] == 4


def test_megatron_core_has_no_communicator_of_16_in_24():
    with pytest.raises(peers.NoCommunicatorError, match="16 ranks from 0 of 24"):
        peers._require_communicator(range(16), 24)
    with pytest.raises(peers.NoCommunicatorError, match="8 ranks from 4 of 24"):
        peers._require_communicator(range(4, 12), 24)
    for ranks, total in ((range(24), 24), (range(8, 16), 24), ([5], 24), (range(16, 32), 64)):
        peers._require_communicator(ranks, total)


def slow(problem):
    time.sleep(60)


def dies(problem):
    os._exit(7)


def raises(problem):
    raise IndexError("list assignment\nindex out of range")


def forgets(problem):
    return peers.complete(problem, [peers.Placed([0], [0])], 0.0)


@pytest.mark.parametrize(
    "planner, problem, limit_s",
    [
        (slow, "no plan in 0 s", 0.2),
        (dies, "died with exit code 7", 60),
        (raises, "IndexError: list assignment", 60),
        (forgets, "sequence not placed: 1 and 254 more", 60),
    ],
)
def test_failures_are_results(monkeypatch, planner, problem, limit_s):
    monkeypatch.setitem(peers.PEERS, "odd", planner)
    rows = in_process(Job("o1", "odd", ("free", "lockstep")), 0, COST, limit_s)
    assert [row.mode for row in rows] == ["free", "lockstep"]
    assert {(row.ratio, row.problem) for row in rows} == {(None, problem)}


def test_summary_counts_valid_plans_only():
    rows = [
        Row("s1", "hybrid", "free", 1.02, None, 0.1),
        Row("s1", "lpt", "free", 1.01, None, 0.1),
        Row("s1", "verl_kk", "free", 1.001, None, 0.1, "ring above its capacity: 0 and 0 more"),
        Row("s2", "hybrid", "free", None, None, 0.1, "sequence not placed: 0 and 0 more"),
        Row("s2", "lpt", "free", 1.3, None, 0.1),
    ]
    first, second = bench_planner.summary(rows)
    assert first.startswith("free: hybrid median 1.020, worst 1.020 (s1)")
    assert first.endswith("beaten on: s1 by lpt, s2 by lpt")
    assert second == "free: hybrid has no valid plan on s2"
    text = bench_planner.table(rows, ["s1", "s2", "s3"], "free")
    assert "1.001!" in text and "wrong" in text and "100ms" in text


def test_bench_writes_table_json_and_picture(tmp_path, capsys):
    bench_planner.bench_planner(
        ["--only", "o1", "--planners", "hybrid,lpt,verl_kk", "--out", str(tmp_path)]
    )
    shown = capsys.readouterr().out
    assert "o1   github, 24 ranks of 8K, context 64K, 256 sequences" in shown
    found = json.loads((tmp_path / "planner.json").read_text())
    assert found["cost"] == COST and found["scenarios"].keys() == {"o1"}
    assert found["results"].keys() == {
        f"{mode} {name}" for mode in bench_planner.MODES for name in ("hybrid", "lpt", "verl_kk")
    }
    for mode in bench_planner.MODES:
        below = shown[shown.index(f"{mode}: time over") :].splitlines()
        for line in below[2:4]:
            name, cell = line.split()
            ratio = found["results"][f"{mode} {name}"]["o1"]["ratio"]
            assert 1.0 <= ratio < 4 and float(cell) == pytest.approx(ratio, abs=6e-4)
    assert (tmp_path / "planner.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_sets_ours_against_the_best_valid_plan_of_each_batch():
    rows = [
        Row("s1", "hybrid", "free", 1.1),
        Row("s1", "lpt", "free", 1.32),
        Row("s1", "static_best", "free", 1.21),
        Row("s1", "verl_kk", "free", 1.001, problem="ring above its capacity: 0 and 0 more"),
        Row("s2", "hybrid", "free", 1.25),
        Row("s2", "flexsp", "free", 1.0),
        Row("s3", "hybrid", "free", None, problem="sequence not placed"),
        Row("s3", "lpt", "free", 1.0),
        Row("s1", "lpt", "lockstep", 1.0),
    ]
    (first, second) = planner_results.duels(rows, "free")
    assert (first.scenario, first.peer) == ("s1", "static_best")
    assert first.excess == pytest.approx(0.1)
    assert (second.scenario, second.peer, second.excess) == ("s2", "flexsp", pytest.approx(-0.2))
    assert planner_results.duels(rows, "lockstep") == []


def test_results_are_read_as_they_were_written(tmp_path):
    rows = [
        Row("s1", "hybrid", "free", 1.1, None, 0.25),
        Row("s1", "lpt", "aligned", 1.3, 1.2, 0.5, "ring above its capacity"),
        Row("s2", "lpt", "aligned", problem="no plan in 120 s"),
    ]
    (tmp_path / "planner.json").write_text(bench_planner.to_json(rows, [], 0, COST))
    batches, again = planner_results.read_results(tmp_path / "planner.json")
    assert again == rows and batches == bench_planner.about(["s1", "s2"])
    lines = list(planner_results.tables(rows, batches))
    assert "| free | hybrid |" in lines and "| s1 | 1.100 |" in lines
    assert "| aligned | longest first |" in lines and "| s1 | 1.300! |" in lines
    assert lines[-1] == "| s2 | late |"


def test_the_picture_of_the_guide_can_be_read(tmp_path):
    batches, rows = planner_results.read_results(planner_results.RESULTS / "planner.json")
    with pictures.drawn_figures() as drawn:
        planner_results.plot(rows, batches, tmp_path / "planner.png")
    pictures.require_readable(drawn[0])
    texts = [text for text, _ in pictures.texts_of(drawn[0])]
    assert all(any(text.endswith(f"  {name}") for text in texts) for name in batches)
    duels = [duel for mode in bench_planner.MODES for duel in planner_results.duels(rows, mode)]
    assert len(duels) == 3 * len(batches)
    assert all(
        any(text.endswith(planner_results.NAMES[one.peer]) for text in texts) for one in duels
    )


def test_the_picture_is_drawn_again_without_measuring(tmp_path, capsys, monkeypatch):
    rows = [Row("s1", "hybrid", "free", 1.1, None, 0.1), Row("s1", "lpt", "free", 1.3, None, 0.1)]
    (tmp_path / "planner.json").write_text(bench_planner.to_json(rows, [], 0, COST))
    monkeypatch.setattr(bench_planner, "in_process", None)
    bench_planner.bench_planner(["--redraw", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"written: {tmp_path}/planner.png\n"
    image = np.asarray(Image.open(tmp_path / "planner.png").convert("RGB")).astype(int)
    assert np.all(np.abs(image - (0x21, 0x66, 0xAC)) < 12, axis=-1).sum() > 500  # the bar
    with pytest.raises(SystemExit):
        bench_planner.bench_planner(["--redraw", "--out", str(tmp_path / "none")])
    assert "there is no planner.json" in capsys.readouterr().err


def test_unknown_names_are_refused(capsys):
    for arguments in (["--only", "s99"], ["--planners", "magic"]):
        with pytest.raises(SystemExit):
            bench_planner.parse(arguments)
        assert "is unknown; choose from" in capsys.readouterr().err


def test_scenarios_are_what_they_say():
    lengths = corpus_lengths(131072, None, 0)
    assert len(lengths) > 100 and lengths.max() <= 131072 and lengths.min() > 0
    some = corpus_lengths(131072, 50, 1)
    assert len(some) == 50 and set(some.tolist()) <= set(lengths.tolist())
    for scenario in bench_planner.SCENARIOS.values():
        assert scenario.describe().startswith(scenario.lengths)
    drawn = Scenario("github", 8, 4096, 1024, None, 1 << 20).draw(3)
    assert drawn.sum() == 1 << 20 and drawn.max() <= 4096
    assert np.array_equal(drawn, Scenario("github", 8, 4096, 1024, None, 1 << 20).draw(3))
