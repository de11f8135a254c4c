"""The learning rate is a pure, continuous function of tokens."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config import OptimConfig, SegmentConfig
from megascale.config.lr_curves import USED, expand
from megascale.errors import UserError
from megascale.optim.schedule import joints, lr_at

WARM_UP = SegmentConfig(shape="linear", tokens=1000, lr=1e-3)
DECAY = SegmentConfig(shape="cosine", tokens=8000, lr=1e-4)
HOLD = SegmentConfig(shape="constant", lr=1e-4)
USUAL = (WARM_UP, DECAY, HOLD)

SEGMENTS = st.lists(
    st.builds(
        SegmentConfig,
        shape=st.sampled_from(["linear", "cosine", "inverse_sqrt", "exponential", "constant"]),
        tokens=st.integers(1, 10**9),
        lr=st.floats(1e-9, 1),
        timescale=st.floats(1e-3, 1e6),
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


def steepest(segment: SegmentConfig, begin_lr: float) -> float:
    """Largest change of rate per part of a segment; without bound where it leaves 0 by factors."""
    a, way = segment.timescale, abs(segment.lr - begin_lr)
    if segment.shape == "exponential":
        rates = sorted([segment.lr, begin_lr])
        return rates[1] * math.log(rates[1] / rates[0]) if rates[0] else math.inf
    return {
        "constant": 0.0,
        "linear": way,
        "cosine": way * math.pi / 2,
        "inverse_sqrt": way * (a / 2) / (1 - 1 / math.sqrt(1 + a)),
    }[segment.shape]


@given(SEGMENTS, st.integers(0, 6 * 10**9))
def test_continuous_but_for_jumps_to_constants(segments: list[SegmentConfig], seen: int) -> None:
    """Over one token the rate moves at most as far as where its segment is steepest."""
    begin, begin_lr = 0, 0.0
    for segment in segments:
        end = begin + (segment.tokens or 0)
        if begin <= seen < end and not (segment.shape == "constant" and seen == begin):
            slope = steepest(segment, begin_lr) / (end - begin)
            step = abs(lr_at(seen + 1, segments) - lr_at(seen, segments))
            assert step <= slope * (1 + 1e-6) + 1e-12
        begin, begin_lr = end, segment.lr


@given(SEGMENTS, st.integers(0, 10**10))
def test_never_outside_the_rates_given(segments: list[SegmentConfig], seen: int) -> None:
    highest = max(segment.lr for segment in segments)
    assert 0 <= lr_at(seen, segments) <= highest * (1 + 1e-12)


def curve(tokens: int, **options) -> tuple[SegmentConfig, ...]:
    return expand(OptimConfig(**options), tokens).schedule


def infinite_of_the_paper(
    t: float, t_w: int, n_cd: int, n_const: int, t_end: int, cooldown: str
) -> float:
    """Section 5.4 of the notes on arXiv 2403.08763, as it stands there."""
    eta_max, eta_min, eta_const, a = 3e-4, 3e-5, 1.65e-4, 10
    n, t_ann = t - t_w, t_w + n_cd + n_const
    if t <= t_w:
        return eta_max * t / t_w
    if n <= n_cd and cooldown == "cosine":
        return eta_const + (eta_max - eta_const) / 2 * (math.cos(math.pi * n / n_cd) + 1)
    if n <= n_cd:
        h, h1 = 1 / math.sqrt(1 + a * n / n_cd) - 1, 1 / math.sqrt(1 + a) - 1
        return eta_max + (eta_const - eta_max) / h1 * h
    if n <= n_cd + n_const:
        return eta_const
    return eta_const * (eta_min / eta_const) ** ((t - t_ann) / (t_end - t_ann))


@pytest.mark.parametrize(
    ("shape", "tokens", "lr"),
    [
        ("cosine", 100, 3e-4), ("cosine", 3100, 2.325e-4), ("inverse_sqrt", 3100, 1.856e-4),
        ("cosine", 6100, 1.65e-4), ("inverse_sqrt", 6100, 1.65e-4), ("cosine", 7000, 1.65e-4),
        ("cosine", 8600, 1.65e-4), ("cosine", 9300, 7.036e-5), ("cosine", 10_000, 3e-5),
        ("cosine", 12_000, 3e-5),
    ],
)  # fmt: skip
def test_the_infinite_curve_of_the_paper_by_default(shape: str, tokens: int, lr: float) -> None:
    """Warm-up 1 %, cooldown 60 %, constant, anneal 14 %: the authors' config."""
    segments = curve(10_000, curve="infinite", cooldown_shape=shape)
    assert f"{lr_at(tokens, segments):.3e}" == f"{lr:.3e}"
    assert [segment.tokens for segment in segments] == [100, 6000, 2500, 1400, None]


@given(
    st.sampled_from(["cosine", "inverse_sqrt"]),
    st.tuples(*[st.integers(1, 10**12)] * 4),
    st.floats(0, 1),
)
def test_the_infinite_curve_is_the_papers_formula(shape, lengths, part) -> None:
    warmup, cooldown, constant, anneal = lengths
    end = sum(lengths)
    lengths = {"warmup_tokens": warmup, "cooldown_tokens": cooldown, "anneal_tokens": anneal}
    segments = curve(end, curve="infinite", cooldown_shape=shape, **lengths)
    seen = round(part * end)
    wanted = infinite_of_the_paper(seen, warmup, cooldown, constant, end, shape)
    assert lr_at(seen, segments) == pytest.approx(wanted, rel=1e-9, abs=1e-18)


CURVES = st.fixed_dictionaries(
    {"lr": st.floats(1e-6, 1.0), "curve": st.sampled_from(sorted(USED))},
    optional={"warmup_tokens": st.integers(10**7, 10**8)},
)


@given(CURVES, st.integers(10**9, 10**13))
def test_curves_by_name_have_no_jumps(options: dict, tokens: int) -> None:
    if options["curve"] == "anneal":
        options.pop("warmup_tokens", None)
    segments = curve(tokens, **options)
    for end, lr in joints(segments)[1:]:
        for near in (end - 1, end + 1):
            assert abs(lr_at(near, segments) - lr) <= 1e-5 * options["lr"] or near == 0
    begin_lr = lr_at(1, segments)
    assert begin_lr == options["lr"] if options["curve"] == "anneal" else begin_lr < options["lr"]
    assert max(lr for _, lr in joints(segments)) == options["lr"]
    last = options["lr"] if options["curve"] == "constant" else options["lr"] / 10
    assert lr_at(tokens, segments) == lr_at(2 * tokens, segments) == last


@given(st.integers(10**4, 10**12), st.integers(10**4, 10**12), st.floats(0, 1))
def test_the_constant_phase_does_not_depend_on_the_length_of_the_run(one, other, part) -> None:
    """A run that is lengthened, or ends early, has seen the same rates up to its anneal."""
    lengths = {"warmup_tokens": 100, "cooldown_tokens": 1000, "anneal_tokens": 1400}
    seen = round(part * (min(one, other) - 1400))
    for options in (
        {"curve": "infinite", **lengths},
        {"curve": "wsd", "warmup_tokens": 100, "anneal_tokens": 1400},
        {"curve": "constant", "warmup_tokens": 100},
    ):
        assert lr_at(seen, curve(one, **options)) == lr_at(seen, curve(other, **options))


def test_without_an_anneal_the_constant_phase_goes_on_for_ever() -> None:
    segments = curve(10_000, curve="infinite", anneal_tokens=0)
    assert lr_at(6100, segments) == lr_at(10**15, segments) == pytest.approx(1.65e-4)


def test_an_anneal_branches_from_a_constant_phase_without_a_jump() -> None:
    """The new run's first rates are those of the old one, and its end is the old one's end."""
    constant = curve(10_000, curve="infinite")
    branch = curve(1400, curve="anneal", lr=1.65e-4, min_lr=3e-5)
    assert lr_at(1, branch) == lr_at(8600, constant)
    for seen in (1, 100, 700, 1400):
        assert lr_at(seen, branch) == pytest.approx(lr_at(8600 + seen, constant), rel=2e-3)
    assert lr_at(1400, branch) == 3e-5
    for shape, half in (("linear", 9.75e-5), ("cosine", 9.75e-5)):
        other = curve(1401, curve="anneal", lr=1.65e-4, min_lr=3e-5, anneal_shape=shape)
        assert lr_at(701, other) == pytest.approx(half)


def test_wsd_is_stable_and_decays_at_the_end() -> None:
    segments = curve(10_000, curve="wsd", lr=1e-3)
    assert joints(segments) == [(0, 0.0), (100, 1e-3), (9000, 1e-3), (10_000, 1e-4)]
    assert lr_at(9500, segments) == pytest.approx(5.5e-4)
    falling = curve(10_000, curve="wsd", lr=1e-3, anneal_shape="exponential")
    assert lr_at(9500, falling) == pytest.approx(math.sqrt(1e-3 * 1e-4))


def test_rewarming_is_the_cosine_again() -> None:
    """Acceptance fact 3 of arXiv 2403.08763: the old peak at 1 %, the old end at the end."""
    segments = curve(10_000, curve="cosine", lr=3e-4, min_lr=3e-5, warmup_tokens=100)
    assert [lr_at(seen, curve(10_000)) for seen in range(0, 12_000, 50)] == pytest.approx(
        [lr_at(seen, segments) for seen in range(0, 12_000, 50)]
    )
    assert lr_at(100, segments) == 3e-4 and lr_at(10_000, segments) == 3e-5
    assert lr_at(5050, segments) == pytest.approx(1.65e-4)


def test_curves_of_very_short_runs_fit_or_say_what_would() -> None:
    for name in USED:
        for tokens in (1, 2, 3, 10, 101):
            try:
                segments = curve(tokens, curve=name, lr=1e-3)
            except UserError as error:
                works = int(re.search(r"set optim.anneal_tokens=(\d+)", str(error))[1])
                segments = curve(tokens, curve=name, lr=1e-3, anneal_tokens=works)
            assert all(segment.tokens is None or segment.tokens >= 1 for segment in segments)
            assert 0 < lr_at(tokens, segments) <= 1e-3


def test_parts_that_leave_no_constant_phase_join() -> None:
    segments = curve(1000, curve="wsd", warmup_tokens=500, anneal_tokens=500)
    assert [segment.shape for segment in segments] == ["linear", "linear", "constant"]
