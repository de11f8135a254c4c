"""Plans with chunks: their file, their rules, and what each rank has of them."""

import json
import os
from dataclasses import replace

import chunk_plans
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.planner import PlanError, Ring, StepPlan
from megascale.planner.chunk_order import chunks_of_waves, stage_order
from megascale.planner.chunk_rules import check_rank_chunks, peak_tokens

CASES = int(os.environ.get("MEGASCALE_CHUNK_CASES", "40"))
LENGTHS = (40, 6, 7)
MODES = st.sampled_from(["aligned", "lockstep"])


def ring(id, ranks, sequences, index, group=None, chunk=0, chunks=1, spans=()):
    return Ring(id, tuple(ranks), tuple(sequences), 0.0, index, group, chunk, chunks, spans)


GOOD = (
    ring(0, [0, 1], [0], 0, 0, 0, 2, ((0, 24),)),
    ring(1, [2], [1, 2], 0, 1, 0, 2, ((0, 6), (0, 3))),
    ring(2, [0, 1], [0], 1, 0, 1, 2, ((24, 40),)),
    ring(3, [2], [2], 1, 1, 1, 2, ((3, 7),)),
)


def plan_of(rings=GOOD, mode="aligned", capacity=12, **others):
    return StepPlan(
        3, mode, capacity, 1.0, 1.0, 0.0, tuple(rings),
        lengths=LENGTHS, expert_group=3 if mode == "lockstep" else 1, **{"pipeline": 2, **others},
    )  # fmt: skip


def test_a_plan_of_chunks_by_hand():
    plan_of().check(LENGTHS)
    plan_of(mode="lockstep").check(LENGTHS)
    assert [ring.num_tokens(LENGTHS) for ring in GOOD] == [24, 9, 16, 4]
    assert plan_of().stage_order(0, 0, 2) == [(False, 0), (False, 1), (True, 1), (True, 0)]
    peaks = peak_tokens(GOOD, LENGTHS, 3, 2)
    assert peaks.tolist() == [20, 20, 13]


def test_ranks_share_each_chunk_as_they_share_a_sequence():
    """Rank i of d has the parts i and 2d-1-i of the 2d parts of the chunk's range."""
    first, second = plan_of().micro_batches(0)
    assert first.token_ranges == (((0, 6), (18, 24)),) and second.token_ranges[0][0] == (24, 28)
    assert second.positions.tolist() == [*range(24, 28), *range(36, 40)]
    whole, part = plan_of().micro_batches(2)
    assert whole.token_ranges == (((0, 6),), ((0, 3),)) and part.token_ranges == (((3, 7),),)
    assert part.cu_seqlens.tolist() == [0, 4] and part.positions.tolist() == [3, 4, 5, 6]


def test_the_file_has_the_fields_of_chunks_where_they_say_something():
    plan = plan_of()
    text = json.dumps(plan.to_json())
    assert StepPlan.from_json(json.loads(text)) == plan == StepPlan.from_bytes(plan.to_bytes())
    assert json.loads(text)["rings"][2] == {
        "id": 2, "ranks": [0, 1], "sequences": [0], "offload": 0.0, "index": 1,
        "group": 0, "chunk": 1, "chunks": 2, "spans": [[24, 40]],
    }  # fmt: skip
    assert json.loads(text)["pipeline"] == 2
    assert (
        plan.digest()
        != replace(plan, rings=(replace(GOOD[0], spans=((0, 23),)), *GOOD[1:])).digest()
    )


def test_a_plan_of_whole_sequences_has_the_bytes_that_it_had():
    plan = StepPlan(2, "free", 10, 1.0, 1.0, 0.0, (ring(0, [0, 1], [0], 0), ring(1, [1], [1], 1)))
    assert plan.to_bytes() == (
        b'{"capacity":10,"expert_group":1,"lower_bound_s":1.0,"mode":"free","num_ranks":2,'
        b'"plan_s":0.0,"predicted_s":1.0,"rings":[{"id":0,"index":0,"offload":0.0,"ranks":[0,1],'
        b'"sequences":[0]},{"id":1,"index":1,"offload":0.0,"ranks":[1],"sequences":[1]}],'
        b'"stage_layers":2}'
    )
    assert StepPlan.from_bytes(plan.to_bytes()) == plan


def changed(at, **change):
    return [replace(one, **change) if place == at else one for place, one in enumerate(GOOD)]


BROKEN = {
    "is one of 0 chunks": changed(0, chunks=0),
    "ring 2 is chunk 2 of 2": changed(2, chunk=2),
    "ring 2 is chunk -1 of 2": changed(2, chunk=-1),
    "ring 0 is a chunk without a group": [
        replace(one, group=None) if one.group == 0 else one for one in GOOD
    ],
    "4 sequences are placed, 3 of them different": changed(2, group=7),
    "ring 0 has 0 ranges of 1 sequences": changed(0, spans=()),
    "ring 0 has a sequence twice": changed(0, sequences=(0, 0), spans=((0, 4), (4, 24))),
    "computes tokens 24 to 41 of sequence 0, which has 40": changed(2, spans=((24, 41),)),
    "computes tokens 24 to 24 of sequence 0": changed(2, spans=((24, 24),)),
    "computes tokens -1 to 24": changed(0, spans=((-1, 24),)),
    "overlap at token 23 of sequence 0": changed(2, spans=((23, 40),)),
    "leave out tokens at token 24 of sequence 0": changed(2, spans=((25, 40),)),
    "leave out tokens at token 0 of sequence 0": changed(0, spans=((1, 24),)),
    "end at token 39 of 40": changed(2, spans=((24, 39),)),
    "chunks of group 0 leave out tokens at token 0 of sequence 0": [
        replace(GOOD[0], spans=((24, 40),)), GOOD[1], replace(GOOD[2], spans=((0, 24),)), GOOD[3]
    ],
    "whole sequences and fields of a chunk": [
        ring(0, [0, 1], [0], 0, group=0), ring(1, [2], [1, 2], 0)
    ],
    "2 sequences are placed": changed(1, sequences=(1,), spans=((0, 6),))[:3],
    "runs ring 3, chunk 1 of group 7": changed(3, sequences=(), spans=(), group=7),
    "is the first of its group, which is named 5": [
        replace(one, group=5) if one.group == 0 else one for one in GOOD
    ],
    "rank 0 ends with chunk 0 of 2": [GOOD[0], GOOD[1], GOOD[3]],
    "with other ranks": changed(2, ranks=(1, 0)),
    "micro-batch 0 is chunk 0 of 2 in ring 0 and chunk 0 of 1 in ring 1": [
        GOOD[0], ring(1, [2], [1], 0), GOOD[2], ring(3, [2], [2], 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("problem", BROKEN)
def test_broken_chunks_are_named_in_a_line(problem):
    with pytest.raises(PlanError) as raised:
        plan_of(BROKEN[problem], capacity=20).check(LENGTHS)
    text = str(raised.value)
    assert problem in text and "\n" not in text and len(text) < 300


def test_chunks_ask_for_memory_and_for_a_pipeline():
    with pytest.raises(
        PlanError, match="rank 0 holds 20 tokens at a time.* 1 stages of 19 hold 19"
    ):
        plan_of(pipeline=1, capacity=19).check(LENGTHS)
    plan_of(pipeline=1, capacity=20).check(LENGTHS)
    with pytest.raises(PlanError, match="ring 0 holds 24 tokens on 2 ranks of 11"):
        plan_of(capacity=11).check(LENGTHS)
    with pytest.raises(PlanError, match="chunks in free mode"):
        plan_of(mode="free").check(LENGTHS)
    with pytest.raises(PlanError, match="a pipeline of 0 stages"):
        plan_of(pipeline=0).check(LENGTHS)


@pytest.mark.parametrize(
    "change",
    [
        {"spans": 3}, {"spans": [[1, 2, 3]]}, {"spans": [["a", 2]]}, {"chunks": 2.5}, {"id": None},
        {"group": "x"}, {"ranks": 4}, {"ranks": [0.5]}, {"sequences": None}, {"offload": "all"},
        {"colour": "red"}, {"chunk": True}, {"spans": None},
    ],
)  # fmt: skip
def test_a_ring_that_cannot_be_read_is_a_line(change):
    value = json.loads(json.dumps(plan_of().to_json()))
    value["rings"][1].update(change)
    with pytest.raises(PlanError, match="ring") as raised:
        StepPlan.from_json(value)
    assert "\n" not in str(raised.value)


@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(["aligned", "lockstep"]),
)
@settings(max_examples=CASES)
def test_random_plans_keep_the_rules(seed, num_ranks, stages, mode):
    rng = np.random.default_rng(seed)
    plan = chunk_plans.random_plan(rng, num_ranks, stages, mode=mode)
    plan.check(plan.lengths)
    assert StepPlan.from_bytes(plan.to_bytes()) == plan
    held = [[] for _ in plan.lengths]
    for rank in range(num_ranks):
        check_rank_chunks(rank, plan.rings_of(rank), plan.lengths)
        for one in plan.micro_batches(rank):
            for sequence, ranges in zip(one.sequences, one.token_ranges, strict=True):
                held[sequence] += [p for begin, end in ranges for p in range(begin, end)]
    assert [sorted(one) for one in held] == [list(range(length)) for length in plan.lengths]
    _run(plan, stages)


def _run(plan, stages):
    """Run every rank's own orders, a ring's ranks together: all end, within the memory."""
    orders = {
        (rank, stage): plan.stage_order(rank, stage, stages)
        for rank in range(plan.num_ranks)
        for stage in range(stages)
    }
    members = {(rank, one.index): one for one in plan.rings for rank in one.ranks}
    at, done = dict.fromkeys(orders, 0), set()
    kept = dict.fromkeys(orders, 0)
    shares = {
        (rank, one.ring.index): one.num_tokens
        for rank in range(plan.num_ranks)
        for one in plan.micro_batches(rank)
    }
    moved = True
    while moved:
        moved = False
        for (rank, stage), order in orders.items():
            if at[rank, stage] == len(order):
                continue
            backward, index = order[at[rank, stage]]
            ring = members[rank, index]
            before = stage + 1 if backward else stage - 1
            ready = all(
                at[one, stage] < len(orders[one, stage])
                and orders[one, stage][at[one, stage]] == (backward, index)
                and (not 0 <= before < stages or (one, before, backward, index) in done)
                for one in ring.ranks
            )
            for one in ring.ranks if ready else ():
                at[one, stage] += 1
                done.add((one, stage, backward, index))
                kept[one, stage] += -shares[one, index] if backward else shares[one, index]
                assert kept[one, stage] <= max(plan.pipeline, stages) * plan.capacity
            moved = moved or ready
    assert all(at[key] == len(order) for key, order in orders.items())
    assert not any(kept.values())


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=CASES)
def test_a_damaged_plan_is_refused_or_runs(seed, data):
    """A field changed at random: one line, or a plan that all its rules hold for."""
    plan = chunk_plans.random_plan(np.random.default_rng(seed), 3, 2)
    rings = list(plan.rings)
    place = data.draw(st.integers(0, len(rings) - 1))
    numbers = st.integers(-1, 6)
    change = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "group": st.none() | numbers, "chunk": numbers, "chunks": numbers, "index": numbers,
                "spans": st.lists(st.tuples(numbers, numbers), max_size=2).map(tuple),
                "ranks": st.lists(st.integers(0, 2), max_size=3).map(tuple),
            },
        )
    )  # fmt: skip
    rings[place] = replace(rings[place], **change)
    damaged = replace(plan, rings=tuple(rings))
    try:
        damaged.check(plan.lengths)
    except PlanError as error:
        assert "\n" not in str(error)
        return
    _run(damaged, 2)


def test_every_rank_finds_the_order_from_its_own_rings():
    rng = np.random.default_rng(3)
    for _ in range(20):
        plan = chunk_plans.random_plan(rng, 4, 3)
        full = max((chunks_of_waves(plan.rings_of(rank)) for rank in range(4)), key=len)
        for rank in range(4):
            mine = chunks_of_waves(plan.rings_of(rank))
            assert mine == full[: len(mine)]
            assert plan.stage_order(rank, 1, 3) == stage_order(mine, 3, 1)
