"""The order of passes with chunks: legal, 1F1B without chunks, and in little memory."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.planner.chunk_order import pipeline_order, stage_order
from megascale.planner.timeline import one_forward_one_backward

CHUNKS = st.lists(st.integers(1, 9), max_size=7)


def plain_1f1b(count, stages, stage):
    """Megatron's schedule: warm-up forwards, then one forward and one backward, then the rest."""
    warm_up = min(stages - stage - 1, count)
    order = [(False, index) for index in range(warm_up)]
    for index in range(count - warm_up):
        order += [(False, warm_up + index), (True, index)]
    return order + [(True, index) for index in range(count - warm_up, count)]


@given(st.integers(0, 12), st.integers(1, 9))
def test_without_chunks_it_is_1f1b(count, stages):
    for stage in range(stages):
        assert stage_order([1] * count, stages, stage) == plain_1f1b(count, stages, stage)
    passes = one_forward_one_backward(stages, count)
    assert len(set(passes)) == len(passes) == 2 * stages * count


def test_an_order_by_hand():
    """Two waves of two chunks on two stages: F forward, B backward."""
    names = [
        "".join(f"{'FB'[backward]}{index} " for backward, index in stage_order([2, 2], 2, stage))
        for stage in (0, 1)
    ]
    assert names == ["F0 F1 F2 B1 F3 B0 B3 B2 ", "F0 F1 B1 F2 B0 F3 B3 B2 "]


@given(CHUNKS, st.integers(1, 8))
def test_chunks_run_forward_in_order_and_backward_in_reverse(chunks, stages):
    ends = list(itertools.accumulate(chunks))
    backward = [end - 1 - place for k, end in zip(chunks, ends) for place in range(k)]
    for stage in range(stages):
        order = stage_order(chunks, stages, stage)
        assert [index for is_backward, index in order if not is_backward] == list(
            range(sum(chunks))
        )
        assert [index for is_backward, index in order if is_backward] == backward
        for end in ends:  # no gradient of keys and values is missing
            assert order.index((False, end - 1)) < order.index((True, end - 1))


@given(CHUNKS, st.integers(1, 8))
def test_all_stages_together_never_wait_for_ever(chunks, stages):
    """`pipeline_order` would not end; its order respects every stage and every message."""
    passes = pipeline_order(tuple(chunks), stages)
    at = {one: place for place, one in enumerate(passes)}
    assert len(at) == len(passes) == 2 * stages * sum(chunks)
    for stage in range(stages):
        mine = [(bool(backward), index) for s, backward, index in passes if s == stage]
        assert mine == stage_order(chunks, stages, stage)
    for stage, backward, index in passes:
        before = stage + 1 if backward else stage - 1
        if 0 <= before < stages:
            assert at[before, backward, index] < at[stage, backward, index]


@given(CHUNKS, st.integers(1, 8), st.data())
def test_a_rank_without_the_last_waves_has_the_same_order_without_them(chunks, stages, data):
    kept = data.draw(st.integers(0, len(chunks)))
    number = sum(chunks[:kept])
    for stage in range(stages):
        whole = stage_order(chunks, stages, stage)
        assert stage_order(chunks[:kept], stages, stage) == [
            one for one in whole if one[1] < number
        ]


@pytest.mark.parametrize(("chunks", "stages"), [(4, 4), (8, 4), (16, 8), (3, 8)])
def test_equal_waves_keep_little_more_than_one_wave(chunks, stages):
    """kappa C (1 + (p - 1) / k) tokens: a wave, and a chunk for each stage after the first."""
    order = stage_order([chunks] * 5, stages, 0)
    kept = np.cumsum([-1 if backward else 1 for backward, _ in order])
    assert kept.max() == chunks + stages - 1
    last = stage_order([chunks] * 5, stages, stages - 1)
    assert np.cumsum([-1 if backward else 1 for backward, _ in last]).max() == chunks
