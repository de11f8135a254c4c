"""How long a run is: by dealing it, by estimate, and as an upper bound."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import Lengths, data, shard

from megascale.config import DataConfig, TrainConfig
from megascale.config.schema import BatchRampConfig
from megascale.corpus import run_length as lengths
from megascale.corpus.batches import Cursor, GlobalBatches
from megascale.corpus.run_length import begin_after, is_over, most_tokens, run_length


def walked(batches: GlobalBatches, tokens: int, cursor: Cursor | None = None) -> list[Cursor]:
    """The cursors of a run, the first and the last among them, step by step."""
    cursors = [cursor or Cursor()]
    while cursors[-1].tokens_seen < tokens:
        cursors.append(batches.next(cursors[-1])[1])
    return cursors


RUNS = st.fixed_dictionaries(
    {
        "context": st.integers(1, 60),
        "batch": st.integers(1, 200),
        "tokens": st.integers(1, 900),
        "seed": st.integers(0, 3),
        "weights": st.lists(st.floats(0.05, 5), min_size=1, max_size=3),
        "stages": st.lists(st.integers(1, 400), max_size=2),
        "ramp": st.one_of(st.none(), st.tuples(st.integers(1, 200), st.integers(1, 700))),
    }
)


def run_of(options: dict) -> tuple[DataConfig, dict[str, Lengths], int]:
    """Blends of the weights, turned by one source in each stage."""
    weights, ends = options["weights"], [*options["stages"], None]
    blends = [
        (end, {f"s{i}": weights[(i + turn) % len(weights)] for i in range(len(weights))})
        for turn, end in enumerate(ends)
    ]
    sizes = {"context_tokens": options["context"], "global_batch_tokens": options["batch"]}
    if options["ramp"] is not None:
        start, over = options["ramp"]
        start = min(start, options["batch"])
        sizes["batch_ramp"] = BatchRampConfig(start_tokens=start, over_tokens=over)
    draw = np.random.default_rng(options["seed"])
    shards = {f"s{i}": Lengths(draw.integers(1, 90, 30)) for i in range(len(weights))}
    return data(blends, **sizes), shards, options["tokens"]


@settings(max_examples=120, deadline=None)
@given(RUNS)
def test_length_is_that_of_the_run(options: dict) -> None:
    config, shards, tokens = run_of(options)
    batches = GlobalBatches(config, shards, 1)
    found, cursors = run_length(batches, tokens, Cursor()), walked(batches, tokens)
    assert cursors[-2].tokens_seen < tokens <= cursors[-1].tokens_seen == found.num_tokens
    assert found.num_steps == len(cursors) - 1 and found.end == cursors[-1]
    assert found.read == {name: one.tokens for name, one in cursors[-1].sources.items()}
    assert set(found.stages) == {cursor.stage for cursor in cursors[1:]}
    train = TrainConfig(tokens=tokens)
    assert [is_over(cursor, train) for cursor in cursors] == [False] * (len(cursors) - 1) + [True]
    for cursor in cursors:
        assert found.total_steps(cursor) == found.num_steps
        assert found.step_reaching(cursor.tokens_seen) == cursor.step
    middle = cursors[len(cursors) // 2]
    assert run_length(batches, tokens, middle).num_steps == found.num_steps


@settings(max_examples=150, deadline=None)
@given(RUNS)
def test_a_run_fits_the_epochs_that_it_was_allowed(options: dict) -> None:
    """What is checked before a run is enough: no source is used up in its midst."""
    config, shards, tokens = run_of(options)
    most = most_tokens(config, tokens)
    epochs = max(math.ceil(count / shards[name].num_tokens) for name, count in most.items())
    batches = GlobalBatches(replace(config, max_epochs=max(1, epochs)), shards, 1)
    *_, end = walked(batches, tokens)
    loose = config.global_batch_tokens + 2 * config.context_tokens
    for name, count in most.items():
        read = end.sources[name].tokens if name in end.sources else 0
        assert read < count + config.context_tokens
        assert read > count - loose or len(config.stages) > 1


def test_the_check_of_epochs_is_exact_for_one_stage() -> None:
    config = data([(None, {"a": 1})], global_batch_tokens=100, context_tokens=500)
    shards, whole = {"a": shard(*[500] * 8)}, 8 * 500
    assert most_tokens(config, whole) == {"a": whole}
    batches = GlobalBatches(replace(config, max_epochs=1), shards, 1)
    assert walked(batches, whole)[-1].tokens_seen == whole
    assert most_tokens(config, whole + 1)["a"] > whole


@pytest.mark.parametrize("batch_tokens", [64, 700, 5000])
def test_the_estimate_is_near(monkeypatch: pytest.MonkeyPatch, batch_tokens: int) -> None:
    """Of runs that are too long to be dealt."""
    blends = [(40_000, {"a": 3, "b": 1}), (None, {"a": 1, "b": 4})]
    config = data(blends, global_batch_tokens=batch_tokens, context_tokens=512)
    draw = np.random.default_rng(3)
    shards = {"a": Lengths(draw.integers(100, 2000, 900)), "b": Lengths(draw.integers(1, 400, 900))}
    batches = GlobalBatches(config, shards, 1)
    exact = run_length(batches, 100_000, Cursor())
    monkeypatch.setattr(lengths, "MOST_STEPS", 0)
    about = run_length(batches, 100_000, Cursor())
    assert exact.end is not None and about.end is None
    assert about.num_steps == pytest.approx(exact.num_steps, rel=0.05)
    assert about.num_tokens == pytest.approx(exact.num_tokens, rel=0.05)
    assert about.stages == exact.stages == (0, 1)
    for name, count in exact.read.items():
        assert about.read[name] == pytest.approx(count, rel=0.05)
    for cursor in walked(batches, 100_000)[:-1]:
        assert about.total_steps(cursor) > cursor.step
    assert about.total_steps(exact.end) == exact.num_steps


def test_a_grown_run_goes_on_after_its_small_model() -> None:
    config = data([(None, {"a": 1})], global_batch_tokens=100)
    batches = GlobalBatches(config, {"a": shard(*[16] * 400)}, 1)
    small = run_length(batches, 1000, Cursor())
    assert small.end is not None
    begin = begin_after(small)
    assert (begin.step, begin.tokens_seen) == (0, 0)
    assert begin.sources["a"].pieces == small.end.sources["a"].pieces == 63
