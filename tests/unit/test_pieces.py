"""What runs one after another read of a shard, each in pieces and an order of its own."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config import ReadConfig
from megascale.corpus.pieces import Order, PieceIndex, ReadIndex, epochs_begun, left_by


@dataclass
class Lengths:
    lengths: np.ndarray
    prefix: str = "/nowhere/train"


def tokens_of(pieces) -> Counter[tuple[int, int]]:
    """How often each (document, offset) is in the pieces."""
    return Counter(
        (int(document), offset)
        for document, start, length in zip(
            pieces.document, pieces.start, pieces.length, strict=True
        )
        for offset in range(start, start + length)
    )


def read(shard, reads, seed, context, count):
    """(the pieces that a run of `seed` reads after `reads`, the record of that)."""
    whole = PieceIndex.of_shard(shard, context)
    pieces = Order("web", seed, left_by(shard, reads, context), whole).pieces(0, count)
    record = ReadConfig(name="web", seed=seed, context_tokens=context, pieces=count)
    return pieces, (*reads, record)


RUN = st.tuples(st.integers(0, 3), st.sampled_from([3, 4, 8, 64]), st.integers(1, 40))


@settings(max_examples=150)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.lists(RUN, min_size=1, max_size=5))
def test_no_token_comes_again_before_all_have_come(lengths, runs):
    """Whatever the contexts and seeds of the runs: counts of tokens differ by one at most."""
    shard, reads = Lengths(np.array(lengths, dtype=np.int32)), ()
    everything = {(d, o) for d, length in enumerate(lengths) for o in range(length)}
    times, seen = Counter(dict.fromkeys(everything, 0)), set()
    for seed, context, count in runs if everything else []:
        pieces, reads = read(shard, reads, seed, context, count)
        assert len(pieces.length) == count and max(pieces.length) <= context
        times.update(tokens_of(pieces))
        seen |= set(tokens_of(pieces))
        assert max(times.values()) - min(times.values()) <= 1
        assert epochs_begun(shard, reads) == min(times.values())
        replayed = ReadIndex(shard, reads)
        again = replayed.pieces(np.arange(replayed.num_pieces))
        assert set(tokens_of(again)) == seen and max(tokens_of(again).values()) == 1


def test_after_a_restart_all_is_left_and_what_was_read_is_replayed():
    shard = Lengths(np.array([16, 4, 40], dtype=np.int32))
    first, reads = read(shard, (), 1, 4, 5)
    restarted = (*reads, replace(reads[-1], pieces=0))
    assert left_by(shard, restarted, 4).num_tokens == 60
    second, reads = read(shard, restarted, 2, 8, 3)
    assert left_by(shard, reads, 8).num_tokens == 60 - int(second.length.sum())
    assert epochs_begun(shard, reads) == 0
    replayed = ReadIndex(shard, reads)
    again = replayed.pieces(np.arange(replayed.num_pieces))
    assert tokens_of(again) == tokens_of(first) + tokens_of(second)


def test_what_is_left_is_as_long_as_it_can_be():
    """Pieces of 4 that lie side by side unread become one of 8."""
    shard = Lengths(np.array([16, 4, 40], dtype=np.int32))
    pieces, reads = read(shard, (), 1, 4, 5)
    was = tokens_of(pieces)
    left = left_by(shard, reads, 100)
    spans = left.pieces(np.arange(left.num_pieces))
    assert left.num_tokens == 60 - sum(was.values())
    for document, start, length in zip(spans.document, spans.start, spans.length, strict=True):
        after = start + length
        assert after == shard.lengths[document] or (int(document), int(after)) in was
        assert start == 0 or (int(document), int(start) - 1) in was


def test_a_run_of_the_same_order_goes_on_in_it():
    """What the first run had not read comes in the order in which it would have read it."""
    shard = Lengths(np.array([30] * 20, dtype=np.int32))
    whole = PieceIndex.of_shard(shard, 8)
    order = Order("web", 7, whole, whole)
    all_at_once, late = order.pieces(0, 200), order.pieces(50, 150)
    assert np.array_equal(all_at_once.document[50:], late.document)
    assert np.array_equal(all_at_once.start[50:], late.start)


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_left_is_kept_beside_the_shard(tmp_path: Path, writable: bool) -> None:
    for ending in (".idx", ".bin"):
        (tmp_path / f"train{ending}").write_bytes(b"x")
    if not writable:
        (tmp_path / "cache").write_text("a file where the folder should be")
    shard = Lengths(np.array([10, 40, 3], dtype=np.int32), str(tmp_path / "train"))
    _, reads = read(shard, (), 1, 8, 3)
    first, again = (left_by(shard, reads, 16).pieces(np.arange(2)) for _ in range(2))
    assert np.array_equal(first.start, again.start) and first.length.sum() > 0
    kept = list((tmp_path / "cache").glob("*left*")) if writable else []
    assert len(kept) == 2 * writable
