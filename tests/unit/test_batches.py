"""Batches: every piece once per epoch, exact shares, a pure function of the cursor."""

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config import DataConfig, SourceConfig, StageConfig
from megascale.config.schema import ORDER_VERSION, ReadConfig
from megascale.corpus.batches import (
    Cursor,
    GlobalBatch,
    GlobalBatches,
)
from megascale.corpus.pieces import PieceIndex, left_by
from megascale.errors import UserError

NOWHERE = "/nonexistent/shard"


@dataclass(frozen=True)
class Lengths:
    """A shard of which only the lengths exist."""

    lengths: np.ndarray
    prefix: str = NOWHERE

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


def shard(*lengths: int) -> Lengths:
    return Lengths(np.array(lengths, dtype=np.int32))


def random_shard(num_documents: int, seed: int, longest: int = 60) -> Lengths:
    return Lengths(np.random.default_rng(seed).integers(1, longest, num_documents))


def data(blends: list[tuple[int | None, dict[str, float]]], **options: int) -> DataConfig:
    names = dict.fromkeys(name for _, blend in blends for name in blend)
    return DataConfig(
        sources={name: SourceConfig(path=name) for name in names},
        stages=tuple(StageConfig(tokens=tokens, blend=blend) for tokens, blend in blends),
        **{"context_tokens": 16, "global_batch_tokens": 500, **options},
    )


def deal(batches: GlobalBatches, steps: int, cursor: Cursor | None = None) -> list[tuple]:
    dealt, cursor = [], cursor or Cursor()
    for _ in range(steps):
        batch, cursor = batches.next(cursor)
        dealt.append((batch, cursor))
    return dealt


def as_tuples(batch: GlobalBatch) -> list[tuple[int, ...]]:
    return list(zip(batch.source, batch.document, batch.start, batch.length, strict=True))


@given(lengths=st.lists(st.integers(0, 100), max_size=40), context=st.integers(1, 50))
def test_pieces_cover_every_token_once(lengths: list[int], context: int) -> None:
    index = PieceIndex(np.array(lengths, dtype=np.int32), context)
    pieces = index.pieces(np.arange(index.num_pieces))
    found = list(zip(pieces.document, pieces.start, pieces.length, strict=True))
    expected = [
        (document, start, min(context, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, context)
    ]
    assert found == expected
    assert index.num_tokens == sum(lengths)


def test_pieces_come_in_the_order_asked_for() -> None:
    pieces = PieceIndex(np.array([5, 0, 3, 8]), 4).pieces(np.array([4, 0, 2, 1, 4]))
    assert pieces.document.tolist() == [3, 0, 2, 0, 3]
    assert pieces.start.tolist() == [4, 0, 0, 4, 4]
    assert pieces.length.tolist() == [4, 4, 3, 1, 4]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    context=st.integers(1, 40),
    batch_tokens=st.integers(1, 300),
    seed=st.integers(0, 5),
)
def test_every_piece_exactly_once_per_epoch(
    lengths: list[int], context: int, batch_tokens: int, seed: int
) -> None:
    config = data([(None, {"a": 1})], context_tokens=context, global_batch_tokens=batch_tokens)
    batches = GlobalBatches(config, {"a": shard(*lengths)}, seed)
    num_pieces = sum(-(-length // context) for length in lengths)
    pieces: list[tuple[int, ...]] = []
    cursor = Cursor()
    while len(pieces) < 2 * num_pieces:
        batch, cursor = batches.next(cursor)
        pieces += as_tuples(batch)
    epochs = pieces[:num_pieces], pieces[num_pieces : 2 * num_pieces]
    for epoch in epochs:
        assert len(set(epoch)) == num_pieces
        assert sum(piece[3] for piece in epoch) == sum(lengths)
    if num_pieces > 30:
        assert epochs[0] != epochs[1]


@settings(max_examples=40)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    batch_tokens=st.integers(1, 700),
    context=st.integers(1, 40),
)
def test_shares_are_exact_to_one_sequence_at_every_step(
    weights: list[float], batch_tokens: int, context: int
) -> None:
    blend = {f"s{i}": weight for i, weight in enumerate(weights)}
    config = data([(None, blend)], context_tokens=context, global_batch_tokens=batch_tokens)
    shards = {name: random_shard(50 + i, i) for i, name in enumerate(blend)}
    total = sum(Fraction(weight) for weight in weights)
    somebody_owes = batch_tokens >= len(blend) * context
    for step, (batch, cursor) in enumerate(deal(GlobalBatches(config, shards, 1), 12)):
        assert batch.num_sequences
        for name, weight in blend.items():
            target = Fraction(weight) / total * (step + 1) * batch_tokens
            excess = cursor.sources[name].tokens - target
            assert 0 <= excess and (excess < context + 1 or not somebody_owes)
        assert cursor.tokens_seen == sum(one.tokens for one in cursor.sources.values())


@settings(max_examples=30)
@given(stop=st.integers(0, 14), seed=st.integers(0, 3))
def test_resume_from_the_json_of_any_cursor(stop: int, seed: int) -> None:
    config = data([(2300, {"a": 1, "b": 2}), (1100, {"b": 1}), (None, {"a": 3, "b": 1})])
    shards = {"a": random_shard(40, 1), "b": random_shard(90, 2)}
    whole = deal(GlobalBatches(config, shards, seed), 15)
    cursor = whole[stop - 1][1] if stop else Cursor()
    loaded = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    assert loaded == cursor
    resumed = deal(GlobalBatches(config, shards, seed), 15 - stop, loaded)
    for (batch, after), (other, other_after) in zip(whole[stop:], resumed, strict=True):
        assert as_tuples(batch) == as_tuples(other)
        assert (batch.step, after) == (other.step, other_after)


def test_next_is_pure() -> None:
    batches = GlobalBatches(data([(None, {"a": 1})]), {"a": random_shard(99, 1)}, 1)
    first, second = Cursor(), batches.next(Cursor())[1]
    once = as_tuples(batches.next(second)[0])
    batches.next(first)
    assert as_tuples(batches.next(second)[0]) == once
    assert once != as_tuples(batches.next(first)[0])


def test_seed_changes_the_order() -> None:
    config, shards = data([(None, {"a": 1})]), {"a": random_shard(200, 1)}
    one, other = (GlobalBatches(config, shards, seed).next(Cursor())[0] for seed in (1, 2))
    assert as_tuples(one) != as_tuples(other)


def test_stage_switches_at_the_step_that_begins_at_its_end() -> None:
    config = data([(1000, {"a": 1}), (16, {"b": 1}), (None, {"a": 1, "b": 1})])
    shards = {"a": random_shard(300, 1), "b": random_shard(300, 2)}
    steps = deal(GlobalBatches(config, shards, 1), 5)
    assert [cursor.stage for _, cursor in steps] == [0, 0, 1, 2, 2]
    used = [sorted(set(batch.source.tolist())) for batch, _ in steps]
    assert used == [[0], [0], [1], [0, 1], [0, 1]]


def test_a_source_that_reappears_goes_on_where_it_was() -> None:
    config = data([(1000, {"a": 1}), (1000, {"b": 1}), (None, {"a": 1})])
    shards = {"a": random_shard(300, 1), "b": random_shard(300, 2)}
    seen: Counter[tuple[int, ...]] = Counter()
    for batch, _ in deal(GlobalBatches(config, shards, 1), 8):
        seen.update(as_tuples(batch))
    assert max(seen.values()) == 1


def test_blend_of_a_later_stage_is_exact_whatever_came_before() -> None:
    config = data([(1000, {"a": 9, "b": 1}), (None, {"a": 1, "b": 3})])
    shards = {"a": random_shard(300, 1), "b": random_shard(300, 2)}
    for k, (_, cursor) in enumerate(deal(GlobalBatches(config, shards, 1), 8)[2:], start=1):
        assert 0 <= cursor.sources["a"].stage_tokens - 0.25 * k * 500 < 16
        assert 0 <= cursor.sources["b"].stage_tokens - 0.75 * k * 500 < 16


def test_a_changed_batch_size_goes_on_exactly() -> None:
    shards = {"a": random_shard(300, 1), "b": random_shard(300, 2)}
    config = data([(2000, {"a": 1, "b": 1}), (None, {"b": 1})])
    _, cursor = deal(GlobalBatches(config, shards, 1), 2)[-1]
    wider = GlobalBatches(replace(config, global_batch_tokens=1000), shards, 1)
    batch, cursor = wider.next(cursor)
    assert cursor.stage_nominal_tokens == 2000 and cursor.stage == 0
    assert 0 <= cursor.sources["a"].tokens - 1000 < 16
    assert wider.next(cursor)[1].stage == 1


def test_no_sequence_more_than_the_tokens_owed() -> None:
    """Sequences of 10 tokens meet 40 tokens a step exactly, with four of them."""
    config = data([(None, {"a": 1})], global_batch_tokens=40)
    steps = deal(GlobalBatches(config, {"a": shard(*[10] * 50)}, 1), 20)
    assert [batch.num_sequences for batch, _ in steps] == [4] * 20


def test_no_batch_is_empty_where_sequences_are_longer_than_what_sources_owe() -> None:
    config = data([(None, {"a": 3, "b": 1})], context_tokens=512, global_batch_tokens=512)
    batches = GlobalBatches(config, {name: shard(*[9001] * 50) for name in "ab"}, 1)
    tokens = [0, 0]
    for step, (batch, _) in enumerate(deal(batches, 40), start=1):
        assert batch.num_sequences
        tokens = [tokens[i] + int(batch.length[batch.source == i].sum()) for i in (0, 1)]
        assert all(0 <= n - share * step * 512 <= 1024 for n, share in zip(tokens, (0.75, 0.25)))


def test_max_epochs_can_be_used_up_but_no_more() -> None:
    config = data([(None, {"web": 1})], max_epochs=2, global_batch_tokens=600)
    batches = GlobalBatches(config, {"web": shard(*[100] * 12)}, 1)
    *_, (_, cursor) = deal(batches, 4)
    assert cursor.tokens_seen == 2400
    with pytest.raises(UserError, match=r"'web' is used up at step 4: data.max_epochs = 2"):
        batches.next(cursor)


def test_shares_hold_where_a_batch_is_less_than_a_sequence() -> None:
    """To within one sequence of each source, at every step."""
    config = data([(None, {"a": 9, "b": 1})], context_tokens=1000, global_batch_tokens=100)
    lengths = np.random.default_rng(1).integers(200, 1000, (2, 300))
    batches = GlobalBatches(config, {"a": Lengths(lengths[0]), "b": Lengths(lengths[1])}, 1)
    for _, cursor in deal(batches, 200):
        for name, share in (("a", 0.9), ("b", 0.1)):
            read = cursor.sources[name].tokens if name in cursor.sources else 0
            assert abs(read - share * cursor.tokens_seen) <= 1000
    assert cursor.tokens_seen > 200 * 500


def test_stages_end_with_the_tokens_that_were_read() -> None:
    """Where a step takes more than its batch, too."""
    config = data([(5000, {"a": 1}), (None, {"b": 1})], context_tokens=500, global_batch_tokens=100)
    shards = {"a": shard(*[500] * 90), "b": shard(*[500] * 90)}
    cursors = [cursor for _, cursor in deal(GlobalBatches(config, shards, 1), 14)]
    assert [cursor.stage for cursor in cursors] == [0] * 10 + [1] * 4
    assert cursors[9].tokens_seen == 5000


def test_another_order_of_documents_is_refused() -> None:
    """A changed shuffle must not silently change what was read."""
    value = Cursor(step=3).to_json()
    assert value["order"] == ORDER_VERSION == 1
    del value["order"]  # of versions that did not write it
    assert Cursor.from_json(value).step == 3
    with pytest.raises(UserError, match="documents were read in order 2, and this version"):
        Cursor.from_json({**value, "order": 2})
    read = ReadConfig(name="web", seed=1, context_tokens=8, pieces=3, order=2)
    with pytest.raises(UserError, match="documents were read in order 2, and this version"):
        left_by(SimpleNamespace(), [read], 8)


def test_a_cursor_of_an_earlier_version_goes_on() -> None:
    config, shards = data([(None, {"a": 1})]), {"a": random_shard(99, 1)}
    batches = GlobalBatches(config, shards, 1)
    _, cursor = batches.next(Cursor())
    old = cursor.to_json() | {"nominal_tokens": 500}
    assert batches.next(Cursor.from_json(old))[1] == batches.next(cursor)[1]


def test_source_without_tokens_is_an_error() -> None:
    with pytest.raises(UserError, match="source 'a' has no tokens"):
        GlobalBatches(data([(None, {"a": 1})]), {"a": shard()}, 1)


def test_source_of_share_zero_is_never_read() -> None:
    batches = GlobalBatches(data([(None, {"a": 0, "b": 1})]), {"a": shard(), "b": shard(40)}, 1)
    assert set(batches.next(Cursor())[0].source.tolist()) == {1}


@pytest.mark.parametrize(
    "damaged",
    [None, [], {}, {"step": 1}, {"sources": {"a": 3}}, {"sources": {}, "step": -1},
     {"sources": {}, "step": "1"}, {"sources": {}, "step": True}, {"sources": {}, "epoch": 1},
     {"sources": {"a": {"pieces": 0.5}}}],
)  # fmt: skip
def test_damaged_cursor_is_one_clear_error(damaged: object) -> None:
    with pytest.raises(UserError, match="data cursor: "):
        Cursor.from_json(damaged)


def write_shard(folder: Path, *lengths: int) -> Lengths:
    for ending in (".idx", ".bin"):
        (folder / f"train{ending}").write_bytes(b"x" * sum(lengths))
    return Lengths(np.array(lengths, dtype=np.int32), str(folder / "train"))


def test_piece_index_is_cached_beside_the_shard(tmp_path: Path) -> None:
    source = write_shard(tmp_path, 10, 40, 3)
    first = PieceIndex.of_shard(source, 16)
    (cached,) = (tmp_path / "cache").iterdir()
    assert np.load(cached).tolist() == [1, 4, 5]
    before = cached.stat().st_mtime_ns
    assert PieceIndex.of_shard(source, 16).num_pieces == first.num_pieces == 5
    assert cached.stat().st_mtime_ns == before
    assert PieceIndex.of_shard(source, 8).num_pieces == 2 + 5 + 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_cache_notices_that_the_shard_changed(tmp_path: Path) -> None:
    PieceIndex.of_shard(write_shard(tmp_path, 10, 40, 3), 16)
    changed = PieceIndex.of_shard(write_shard(tmp_path, 40, 10, 30), 16)
    assert changed.pieces(np.arange(6)).document.tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00junk", b"text"])
def test_damaged_cache_is_made_again(tmp_path: Path, damage: bytes) -> None:
    source = write_shard(tmp_path, 10, 40, 3)
    PieceIndex.of_shard(source, 16)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(damage)
    assert PieceIndex.of_shard(source, 16).num_pieces == 5
    assert np.load(cached).tolist() == [1, 4, 5]


def test_no_cache_folder_no_problem(tmp_path: Path) -> None:
    source = write_shard(tmp_path, 10, 40, 3)
    (tmp_path / "cache").write_text("a file where the folder should be")
    index = PieceIndex.of_shard(source, 16)
    assert index.pieces(np.arange(5)).length.tolist() == [10, 16, 16, 8, 3]
    assert sorted(os.listdir(tmp_path)) == ["cache", "train.bin", "train.idx"]
