"""Batches that grow with the tokens of the run: a function of the cursor."""

from dataclasses import replace

import pytest
from test_batches import data, deal, random_shard

from megascale.config import OptimConfig, RunConfig, dump_config, finalize
from megascale.config.schema import BatchRampConfig
from megascale.corpus.batches import Cursor, GlobalBatches, step_tokens
from megascale.corpus.run_length import run_length
from megascale.errors import UserError
from megascale.run.resume import compare_configs

RAMP = BatchRampConfig(start_tokens=100, over_tokens=6000)


def ramped(**options):
    """Two sources, batches from 100 to 700 tokens."""
    config = data([(None, {"a": 3, "b": 1})], context_tokens=10, global_batch_tokens=700)
    return replace(config, **{"batch_ramp": RAMP, **options})


def batches_of(config):
    return GlobalBatches(config, {"a": random_shard(900, 0), "b": random_shard(300, 1)}, 0)


def test_the_size_of_a_step_by_hand():
    config = ramped()
    assert [step_tokens(config, seen) for seen in (0, 10, 3000, 5999, 6000, 10**9)] == [
        *(100, 101, 400, 699, 700, 700)
    ]
    assert step_tokens(ramped(batch_ramp=None), 0) == 700


def test_batches_grow_with_exact_shares():
    config, nominal = ramped(), 0
    for batch, after in deal(batches_of(config), 30):
        nominal += step_tokens(config, after.tokens_seen - batch.num_tokens)
        assert 0 <= after.tokens_seen - nominal < 2 * 10  # within a piece for each source
        assert 0 <= 4 * after.sources["b"].tokens - nominal < 4 * 10
        assert after.stage_nominal_tokens == nominal
    assert batch.num_tokens == pytest.approx(700, abs=20)


def test_a_run_goes_on_from_any_cursor():
    dealt = deal(batches_of(ramped()), 20)
    for place in (0, 7, 19):
        cursor = Cursor.from_json(dealt[place][1].to_json())
        after = deal(batches_of(ramped()), 2, cursor)
        expected = deal(batches_of(ramped()), place + 3)[-2:]
        assert [one.length.tolist() for one, _ in after] == [
            one.length.tolist() for one, _ in expected
        ]


def test_a_long_run_is_estimated_to_a_step(monkeypatch):
    """Steps of a ramp: over / (b - a) ln(b / a), then the rest by whole batches."""
    from megascale.corpus import run_length as lengths

    config = ramped(batch_ramp=BatchRampConfig(start_tokens=100, over_tokens=60_000))
    exact = run_length(batches_of(config), 100_000, Cursor())
    monkeypatch.setattr(lengths, "MOST_PIECES", 0)
    about = run_length(batches_of(config), 100_000, Cursor())
    assert about.end is None and exact.end is not None
    assert about.num_steps == pytest.approx(exact.num_steps, rel=0.02)
    assert about.step_reaching(30_000) == pytest.approx(exact.step_reaching(30_000), rel=0.02)
    assert about.read["b"] == pytest.approx(exact.read["b"], rel=0.02)
    assert about.stages == exact.stages == (0,)


def config_with(ramp):
    """A finalized config with a batch ramp."""
    plain = RunConfig(data=ramped(batch_ramp=ramp), optim=OptimConfig(lr=1e-3))
    return finalize(plain, {"a": 10**6, "b": 10**6}, 257)


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ((701, 6000), "start_tokens = 701 must be from 1 to data.global_batch_tokens = 700"),
        ((0, 6000), "start_tokens = 0"),
        ((100, 0), "over_tokens = 0 must be from 1"),
    ],
)
def test_what_cannot_work_is_one_line(ramp, words):
    with pytest.raises(UserError, match=words):
        config_with(BatchRampConfig(start_tokens=ramp[0], over_tokens=ramp[1]))


def test_a_resumed_run_keeps_its_ramp():
    saved = dump_config(config_with(RAMP))
    assert compare_configs(saved, config_with(RAMP), 0) == []
    for other in (None, replace(RAMP, start_tokens=200)):
        with pytest.raises(UserError, match=r"data.batch_ramp.* was .* branch off"):
            compare_configs(saved, config_with(other), 0)
