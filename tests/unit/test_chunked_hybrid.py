"""`hybrid` with chunks: valid, never slower than whole sequences, near what filling costs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bench_planner import COST, SCENARIOS, chunk_rows
from bench_planner_chunks import MOST_CHUNKS, lines
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale import plan as plan_lengths
from megascale.cli import main
from megascale.config.limits import AT_MOST
from megascale.errors import UserError
from megascale.planner import (
    CostModel,
    Placed,
    Problem,
    StepPlan,
    lower_bound_s,
    plan_hybrid,
    step_s,
)
from megascale.planner.chunk_cut import Lines, cut_waves
from megascale.planner.chunk_order import chunks_of_waves
from megascale.planner.hybrid.chunks import WaveTable, slots_s
from megascale.planner.plan_builder import with_padding
from megascale.planner.problem import MOST_CHUNKS as MOST
from megascale.simulate.lengths import draw_lengths

FLEXSP = CostModel(**COST)


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=25)
def test_plans_are_valid_and_never_slower_than_whole_sequences(seed, data):
    rng = np.random.default_rng(seed)
    num_ranks, capacity = int(rng.integers(1, 9)), int(rng.integers(50, 4000))
    most = num_ranks * capacity if rng.random() < 0.5 else capacity
    lengths = np.clip(rng.lognormal(5, 1.5, int(rng.integers(1, 40))), 1, most).astype(int)
    mode = data.draw(st.sampled_from(["aligned", "lockstep"]))
    stages, chunks = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 20))
    again = data.draw(st.sampled_from([0, 1e-3]))
    cost = replace(FLEXSP, fixed=10.0 ** rng.uniform(-5, -1), prefix_inter=again)
    slow = tuple(rng.choice([1.0, 2.0], num_ranks).tolist()) if rng.random() < 0.3 else ()
    problem = Problem.of(
        lengths, num_ranks, capacity, mode, cost, pipeline=stages, chunks=chunks, slowdown=slow
    )
    plan = plan_hybrid(problem)
    plan.check(lengths.tolist())
    assert max(ring.chunks for ring in plan.rings) <= chunks
    whole = plan_hybrid(replace(problem, chunks=1))
    assert plan.predicted_s <= whole.predicted_s * (1 + 1e-9)
    assert plan.predicted_s == pytest.approx(step_s(plan, lengths, cost, stages, slow))
    assert plan.predicted_s >= lower_bound_s(problem) * (1 - 1e-9)
    assert plan_hybrid(problem).digest() == plan.digest()


def test_a_long_tail_on_a_pipeline_comes_near_the_fill_bound():
    rows = chunk_rows(["s1", "o1"], 0, COST)
    for row in rows:
        assert row.problem == "" and row.peak <= 1
        assert row.chunked < (1.15 if row.stages == 4 else 1.18) and row.chunked < row.whole / 1.1
    text = "\n".join(lines(rows))
    assert "4 stages: chunks median" in text and "8 stages: chunks median" in text


def test_chunks_are_left_out_where_they_do_not_pay():
    """A fixed part longer than all work: one micro-batch, though the pipeline waits."""
    problem = Problem.of([100, 90], 2, 100, "aligned", FLEXSP, pipeline=4, chunks=8)
    dear = replace(problem, cost=replace(FLEXSP, fixed=10.0))
    assert {ring.chunks for ring in plan_hybrid(dear).rings} == {1}
    assert plan_hybrid(dear).pipeline == 1
    lengths = draw_lengths("github", None, 1 << 15, 0, num_sequences=64)
    far = Problem.of(lengths, 16, 4096, "aligned", FLEXSP, pipeline=4, chunks=40)
    chunks = max(ring.chunks for ring in plan_hybrid(far).rings)
    again = replace(FLEXSP, prefix_intra=1e-3, prefix_inter=1e-3)
    assert max(ring.chunks for ring in plan_hybrid(replace(far, cost=again)).rings) < chunks


def test_one_chunk_at_most_is_the_plan_of_whole_sequences():
    lengths = draw_lengths("github", None, 1 << 15, 0, num_sequences=64)
    for others in ({"mode": "free"}, {"mode": "aligned", "pipeline": 1}):
        problem = Problem.of(lengths, 8, 8192, cost=FLEXSP, **others)
        same = plan_hybrid(replace(problem, chunks=9))
        assert same.digest() == plan_hybrid(problem).digest()


@given(st.integers(0, 2**32))
@settings(max_examples=40)
def test_cuts_take_equally_long_and_keep_every_token(seed):
    rng = np.random.default_rng(seed)
    cost = CostModel(a=float(rng.choice([0, 1e-3, 1.0])), b=float(rng.choice([0, 1.0])))
    lengths = rng.integers(1, 3000, 6)
    problem = Problem.of(lengths, 3, 20_000, "aligned", cost, pipeline=2)
    indexed = with_padding(problem, [Placed((0, 1), (4, 0, 2)), Placed((2,), (1, 3, 5))])
    chunks = int(rng.integers(1, 9))
    rings = cut_waves(problem, indexed, [0], [chunks])
    for ranks in ((0, 1), (2,)):
        mine = [ring for ring in rings if ring.ranks == ranks]
        seconds = [
            sum(cost.a * (end**2 - begin**2) + cost.b * (end - begin) for begin, end in spans)
            for spans in (ring.token_spans(lengths) for ring in mine)
        ]
        longest = 2 * cost.a * lengths.max() + cost.b + cost.a  # of a token
        assert max(seconds) - min(seconds) <= 2 * longest + 1e-9
        assert sum(ring.num_tokens(lengths) for ring in mine) == lengths[list(
            indexed[0 if len(ranks) > 1 else 1][1].sequences
        )].sum()  # fmt: skip
    assert len(Lines.of(problem, indexed).cuts(np.array([chunks, chunks]))) == 2 * chunks


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 90)), min_size=1, max_size=6),
       st.integers(1, 6))  # fmt: skip
def test_seconds_of_slots_are_those_of_the_timeline(waves, stages):
    cost = CostModel(a=0.0, b=1.0)
    lengths = [chunks * tokens for chunks, tokens in waves]
    problem = Problem.of(lengths, 1, 600, "aligned", cost, pipeline=stages)
    indexed = with_padding(problem, [Placed((0,), (i,)) for i in range(len(waves))])
    chunks = [chunks for chunks, _ in waves]
    rings = cut_waves(problem, indexed, range(len(waves)), chunks)
    assert chunks_of_waves(rings) == chunks
    plan = replace(plan_hybrid(problem), rings=rings)
    seconds = slots_s(chunks, [float(tokens) for _, tokens in waves], stages)
    assert seconds == pytest.approx(step_s(plan, lengths, cost, max(2, stages)) if stages > 1
                                    else sum(lengths))  # fmt: skip


def test_waves_in_another_order_keep_ranks_in_step():
    """Rank 1 has no part in the first wave that runs, and one in the second: it gets padding."""
    problem = Problem.of([90, 40, 30], 2, 100, "aligned", FLEXSP, pipeline=2, chunks=4)
    indexed = with_padding(problem, [Placed((0,), (0,)), Placed((1,), (1,)), Placed((0,), (2,))])
    rings = cut_waves(problem, indexed, [1, 0], [2, 3])
    assert [(ring.ranks, ring.index) for ring in rings if ring.ranks == (1,)] == [
        ((1,), index) for index in range(5)
    ]
    table = WaveTable.of(problem, indexed)
    plan = table.plan(next(cut for cut in table.cuts() if max(cut.chunks) > 1))
    plan.check([90, 40, 30])


def test_the_setting_has_limits_and_says_what_it_needs():
    assert AT_MOST["planner"]["chunks"] == MOST >= MOST_CHUNKS
    static = {"mode": "aligned", "pipeline": 2, "planner": "static"}
    for others in ({}, {"mode": "aligned"}, static):
        with pytest.raises(UserError, match="chunks=4 needs pipeline=2 or more, and planner"):
            plan_lengths([5, 4], num_ranks=2, capacity_tokens=8, chunks=4, **others)
    with pytest.raises(UserError, match="chunks = 0 must be a whole number from 1 to 256"):
        plan_lengths([5, 4], num_ranks=2, capacity_tokens=8, chunks=0)
    step = plan_lengths(
        SCENARIOS["o1"].draw(0), num_ranks=24, capacity_tokens=8192, mode="aligned", pipeline=4,
        chunks=16,
    )  # fmt: skip
    assert 1 < max(ring.chunks for ring in step.rings) <= 16
    assert sum(batch.num_tokens for batch in step.micro_batches(3)) > 0


def test_plan_and_simulate_take_chunks(tmp_path, capsys):
    lengths, out = tmp_path / "lengths.txt", tmp_path / "plan.json"
    lengths.write_text("\n".join(map(str, SCENARIOS["o1"].draw(0).tolist())))
    words = ["plan", "--lengths", str(lengths), "--ranks", "24", "--capacity", "8Ki"]
    words += ["--mode", "aligned", "--pp", "4", "--json", str(out)]
    seconds = []
    for chunks in ("1", "16"):
        assert main([*words, "--chunks", chunks]) == 0
        value = json.loads(out.read_text())
        seconds.append(value["predicted_s"])
        assert {ring.get("chunks", 1) > 1 for ring in value["rings"]} == {chunks != "1"}
        StepPlan.from_json(value).check(SCENARIOS["o1"].draw(0).tolist())
    assert seconds[1] < seconds[0] / 1.1
    assert main([*words[:-4], "--chunks", "16"]) == 2
    assert "--chunks 16: needs --pp 2 or more" in capsys.readouterr().err
    small = "--ranks 32 --context 32Ki --batch-tokens 512Ki --steps 1 --planners hybrid".split()
    shape = [
        "--model",
        "7b",
        "--tensor",
        "1",
        "--pipeline",
        "4",
        "--json",
        str(tmp_path / "steps.json"),
    ]
    for chunks in ("1", "16"):
        assert main(["simulate", *small, *shape, "--chunks", chunks]) == 0
        rows = {
            one["planner"]: one
            for one in json.loads((tmp_path / "steps.json").read_text())["planners"]
        }
        seconds.append(rows["hybrid"]["step_s"])
    assert seconds[3] < seconds[2]
    assert main(["simulate", *small, "--pipeline", "1", "--chunks", "4"]) == 2
    assert "--chunks 4: needs --pipeline 2 or more" in capsys.readouterr().err
