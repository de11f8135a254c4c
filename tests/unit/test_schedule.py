"""The learning rate is a pure, continuous function of tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config import SegmentConfig
from megascale.optim.schedule import joints, lr_at

WARM_UP = SegmentConfig(shape="linear", tokens=1000, lr=1e-3)
DECAY = SegmentConfig(shape="cosine", tokens=8000, lr=1e-4)
HOLD = SegmentConfig(shape="constant", lr=1e-4)
USUAL = (WARM_UP, DECAY, HOLD)

SEGMENTS = st.lists(
    st.builds(
        SegmentConfig,
        shape=st.sampled_from(["linear", "cosine", "constant"]),
        tokens=st.integers(1, 10**9),
        lr=st.floats(0, 1),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (0, 0.0), (1, 1e-6), (500, 5e-4), (1000, 1e-3),
        (3000, 1e-4 + 9e-4 * (1 + math.cos(math.pi / 4)) / 2), (5000, 5.5e-4),
        (9000, 1e-4), (9001, 1e-4), (10**12, 1e-4),
    ],
)  # fmt: skip
def test_warm_up_cosine_constant(tokens: int, lr: float) -> None:
    assert lr_at(tokens, USUAL) == pytest.approx(lr, rel=1e-12)


def test_first_step_is_not_at_rate_zero() -> None:
    """A step of 200 tokens uses the rate after them, so five steps warm up over 1000."""
    rates = [lr_at(seen, USUAL) for seen in range(200, 1001, 200)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])


def test_constant_holds_its_own_rate_from_just_after_its_joint() -> None:
    steps = (SegmentConfig(tokens=10, lr=3.0), SegmentConfig(tokens=10, lr=1.0))
    assert [lr_at(n, steps) for n in (0, 9, 10, 11, 20, 21)] == [3, 3, 3, 1, 1, 1]


def test_warm_up_again_starts_from_the_end_before() -> None:
    again = (WARM_UP, DECAY, SegmentConfig(shape="linear", tokens=100, lr=1e-3))
    assert lr_at(9000, again) == pytest.approx(1e-4)
    assert lr_at(9050, again) == pytest.approx(5.5e-4)
    assert lr_at(9100, again) == lr_at(10**9, again) == pytest.approx(1e-3)


def test_no_segments_is_no_learning() -> None:
    assert lr_at(5, ()) == 0.0


def test_joints_of_the_usual_schedule() -> None:
    assert joints(USUAL) == [(0, 0.0), (1000, 1e-3), (9000, 1e-4)]
    assert joints([SegmentConfig(lr=2.0)]) == [(0, 2.0)]


@given(SEGMENTS)
def test_joints_hit_every_end_exactly(segments: list[SegmentConfig]) -> None:
    points = joints(segments)[1:]
    assert [lr for _, lr in points] == [segment.lr for segment in segments]
    assert points[-1][0] == sum(segment.tokens or 0 for segment in segments)


@given(SEGMENTS, st.integers(0, 6 * 10**9))
def test_continuous_but_for_jumps_to_constants(segments: list[SegmentConfig], seen: int) -> None:
    """Over one token the rate moves at most pi/2 of its segment's mean slope."""
    begin, begin_lr = 0, 0.0
    for segment in segments:
        end = begin + (segment.tokens or 0)
        if begin <= seen < end and not (segment.shape == "constant" and seen == begin):
            slope = abs(segment.lr - begin_lr) / (end - begin)
            slope = 0.0 if segment.shape == "constant" else slope * math.pi / 2
            step = abs(lr_at(seen + 1, segments) - lr_at(seen, segments))
            assert step <= slope * (1 + 1e-6) + 1e-12
        begin, begin_lr = end, segment.lr


@given(SEGMENTS, st.integers(0, 10**10))
def test_never_outside_the_rates_given(segments: list[SegmentConfig], seen: int) -> None:
    highest = max(segment.lr for segment in segments)
    assert 0 <= lr_at(seen, segments) <= highest * (1 + 1e-12)
