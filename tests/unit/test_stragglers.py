"""Ranks that are slow for their work, and ranks that only have more of it."""

import numpy as np
import pictures
import pytest

from megascale.monitor.stragglers import (
    RankLog,
    StragglerWatch,
    plot_ranks,
    read_slowdowns,
    slowdown_R,
)

MICRO_BATCHES, CALLS = 30, 16


def timed(draw, ranks, slow=None, by=1.1, noise=0.05, more=1.0):
    """Micro-batches of unequal lengths; rank 0 is given `more` times as long ones."""
    tokens = draw.integers(200, 4000, size=(ranks, MICRO_BATCHES)).astype(float)
    tokens[0] *= more
    seconds = CALLS * 2e-5 + CALLS * tokens * 3e-8
    if slow is not None:
        seconds[slow] *= by
    seconds *= np.exp(noise * draw.standard_normal(seconds.shape))
    seconds *= np.where(draw.random(seconds.shape) < 0.03, 5, 1)  # now and then something else ran
    return np.stack([np.full_like(tokens, CALLS), CALLS * tokens, seconds], axis=-1)


def named(draw, ranks, comparisons, **how):
    watch = StragglerWatch(ranks)
    found = [watch.see(slowdown_R(timed(draw, ranks, **how))) for _ in range(comparisons)]
    return [(number, rank) for number, some in enumerate(found, 1) for rank in some]


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_a_rank_10_percent_slow_is_named_in_50_steps(ranks):
    for seed in range(10):
        draw = np.random.default_rng(seed)
        assert named(draw, ranks, 5, slow=1) == [(5, 1)]


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_1000_clean_steps_raise_no_alarm(ranks):
    assert named(np.random.default_rng(ranks), ranks, 100) == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_unequal_plan_is_no_straggler(ranks):
    assert named(np.random.default_rng(1), ranks, 100, more=4.0) == []


def test_a_straggler_is_named_once_until_it_is_well_again():
    watch, slow, well = StragglerWatch(3), np.array([1.0, 1.0, 1.2]), np.array([1.0, 1.0, 1.0])
    assert [watch.see(slow) for _ in range(9)] == [[]] * 4 + [[2]] + [[]] * 4
    watch.see(well)
    assert [watch.see(slow) for _ in range(5)] == [[]] * 4 + [[2]]


def test_ranks_without_micro_batches_are_unknown(tmp_path):
    some = timed(np.random.default_rng(0), 3)
    some[1], some[0, 10:] = np.nan, np.nan
    over = slowdown_R(some)
    assert np.isnan(over[1]) and np.isfinite(over[[0, 2]]).all()
    assert np.isnan(slowdown_R(np.full((2, 5, 3), np.nan))).all()
    assert StragglerWatch(3).see(over) == []
    log = RankLog(tmp_path, None)
    log.write(10, np.ones(2))  # before the number of ranks changed
    log.write(20, over)
    log.write(30, over)
    log.close()
    steps, read = read_slowdowns(tmp_path)
    assert steps == [20, 30]
    np.testing.assert_allclose(read, [over, over], atol=5e-4)
    with pictures.drawn_figures() as drawn:
        plot_ranks(steps[:1], read[:1], "ranks", tmp_path / "one.png")
        plot_ranks(steps, read, "ranks", tmp_path / "ranks.png")
    steps_shown = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert steps_shown == ["20", "21"]
    assert (tmp_path / "ranks.png").stat().st_size > 5000
    assert read_slowdowns(tmp_path / "none") == ([], pytest.approx(np.array([])))
