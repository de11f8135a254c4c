"""Which losses are leaps, and which are noise."""

import json
import math

import numpy as np
import pytest

from megascale.config import SpikeConfig
from megascale.errors import UserError
from megascale.training.spikes import SpikeWatch


def falling(seed, steps=3000):
    """A loss that falls as they do, with the noise of batches, now and then a hard one."""
    draw = np.random.default_rng(seed)
    fall = 2.0 + 8.0 * (1 + np.arange(steps) / 20) ** -0.7
    return fall + 0.05 * draw.standard_t(df=10, size=steps)


def watch(losses, **config):
    one = SpikeWatch(SpikeConfig(**config))
    return one, [step for step, loss in enumerate(losses) if one.see(float(loss))]


@pytest.mark.parametrize("seed", range(5))
def test_a_clean_run_of_thousands_of_steps_raises_no_alarm(seed):
    assert watch(falling(seed))[1] == []


@pytest.mark.parametrize("seed", range(5))
def test_leaps_are_named_and_do_not_change_what_is_usual(seed):
    losses = falling(seed)
    leaps = [400, 401, 1700, 2500]
    losses[leaps] += 1.0
    assert watch(losses)[1] == leaps


@pytest.mark.parametrize("spike", [3.0, 90.0, math.inf, math.nan])
def test_nothing_is_learned_from_spikes(spike):
    """Whatever their number, and where they make up half of the window."""
    losses = list(np.random.default_rng(0).normal(2.0, 0.01, 100))
    one, _ = watch(losses)
    limit, known = one.limit, one.to_json()["losses"]
    assert all(one.see(spike) for _ in range(200))
    assert one.limit == limit and one.to_json()["losses"] == known
    other, _ = watch(losses)
    for loss in losses:
        assert not other.see(loss) and other.see(spike)
    assert other.limit == limit and other.to_json()["losses"] == losses


def test_what_was_usual_comes_back_with_the_checkpoint():
    one, _ = watch([2.0] * 50, action="rollback", patience_steps=3)
    saved = one.to_json()
    for _ in range(60):
        one.see(1.0)
    assert one.limit < 1.5
    for _ in range(3):
        assert one.see(9.0)
    one.roll_back(saved, to=50, at=113)
    assert one.limit == pytest.approx(2.0 * (1 + 8 * 0.005)) and one.in_a_row == 0
    assert one.see(9.0) and one.most_loss < 3


@pytest.mark.parametrize("saved", [{"losses": [5.0] * 19, "in_a_row": 0, "rolled_to": None}, None])
def test_what_was_usual_before_the_spikes_holds_on_where_the_checkpoint_knows_nothing(saved):
    one, _ = watch([2.0] * 50, action="rollback")
    one.see(9.0)
    one.roll_back(saved, to=19, at=51)
    assert one.limit == pytest.approx(2.0 * (1 + 8 * 0.005)) and one.see(9.0)


def test_no_checkpoint_is_due_among_spikes_or_before_a_rollback_has_shown_its_use():
    one, _ = watch([2.0] * 50, action="rollback", patience_steps=3)
    assert one.is_settled(50)
    one.see(9.0)
    assert not one.is_settled(51)
    one.roll_back(None, to=40, at=53)
    assert [step for step in range(53, 60) if one.is_settled(step)] == [56, 57, 58, 59]
    skip, _ = watch([2.0] * 50 + [9.0], action="skip")
    assert skip.is_settled(51)


def test_nothing_is_known_at_first():
    one, leaps = watch([5.0] * 19)
    assert one.limit == math.inf and leaps == []
    one.see(5.0)
    assert one.limit == pytest.approx(5.0 * (1 + 8 * 0.005))  # even losses have no spread


def test_only_leaps_in_a_row_persist():
    one, _ = watch([2.0] * 50, patience_steps=3)
    for loss in (9.0, 9.0, 2.0, 9.0, math.nan):
        one.see(loss)
    assert one.in_a_row == 2 and not one.persists
    one.see(math.inf)
    assert one.persists
    one.begin_anew()
    assert one.limit == math.inf and not one.persists


def test_warning_leaves_no_update_out():
    assert watch([2.0] * 50)[0].most_loss == math.inf
    skip, _ = watch([2.0] * 50, action="skip")
    assert skip.most_loss == skip.limit < 3


def test_its_state_goes_with_the_checkpoint():
    losses = falling(1)[:500]
    one, _ = watch(losses, window_steps=64)
    one.see(50.0)
    other = SpikeWatch(SpikeConfig(window_steps=64))
    other.go_on(json.loads(json.dumps(one.to_json())))
    assert other.limit == one.limit and other.in_a_row == 1
    other.roll_back(one.to_json(), to=7, at=9)
    third = SpikeWatch(SpikeConfig(window_steps=64))
    third.go_on(json.loads(json.dumps(other.to_json())))
    assert (third.rolled_to, third.rolled_at, third.in_a_row) == (7, 9, 0)
    old = {"losses": [2.0], "in_a_row": 1, "rolled_to": 7}
    third.go_on(old)  # as earlier versions wrote it
    assert (third.rolled_to, third.rolled_at) == (7, 7)
    with pytest.raises(UserError, match="record of losses is damaged"):
        other.go_on({"losses": "none"})


def test_a_watch_may_be_switched_off():
    one, leaps = watch([2.0] * 50 + [90.0, math.nan], window_steps=0, action="skip")
    assert leaps == [] and one.limit == one.most_loss == math.inf
    seen, _ = watch([2.0] * 50)
    one.go_on(seen.to_json())
    assert one.limit == math.inf
