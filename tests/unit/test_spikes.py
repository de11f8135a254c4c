"""Which losses are leaps, and which are noise."""

import json
import math

import numpy as np
import pytest

from megascale.config import SpikeConfig
from megascale.errors import UserError
from megascale.resilience.spikes import SpikeWatch


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
    other.begin_anew(rolled_to=7)
    assert other.to_json()["rolled_to"] == 7
    for _ in range(20):
        other.see(2.0)
    assert other.rolled_to is None  # what is usual is known again
    with pytest.raises(UserError, match="record of losses is damaged"):
        other.go_on({"losses": "none"})


def test_a_watch_may_be_switched_off():
    one, leaps = watch([2.0] * 50 + [90.0, math.nan], window_steps=0, action="skip")
    assert leaps == [] and one.limit == one.most_loss == math.inf
    seen, _ = watch([2.0] * 50)
    one.go_on(seen.to_json())
    assert one.limit == math.inf
