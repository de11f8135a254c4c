"""Sources that read the documents of a range of lengths from a corpus."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import EOD, VOCAB

from megascale.config import DataConfig, RunConfig, SourceConfig, StageConfig, finalize
from megascale.config.schema import ReadConfig
from megascale.corpus.batches import Cursor, GlobalBatches
from megascale.corpus.pieces import PieceIndex, ReadIndex, documents_of, epochs_begun, left_by
from megascale.corpus.shards import Shard, ShardWriter
from megascale.corpus.sources import SourceInfo, identity
from megascale.errors import UserError
from megascale.run.heldout_sets import scored_sources

LENGTHS = (3, 40, 7, 25, 8, 100, 1, 12)


@pytest.fixture
def corpus(tmp_path):
    """The prefix of a shard with documents of LENGTHS."""
    writer = ShardWriter(tmp_path / "train", np.uint16)
    for length in LENGTHS:
        writer.add(np.append(np.zeros(length - 1, np.uint16), np.uint16(EOD)))
    writer.close()
    return str(tmp_path / "train")


def source(corpus, shortest=0, longest=None):
    """A source of that corpus."""
    return SourceConfig(
        path=corpus,
        vocab_size=VOCAB,
        eod_id=EOD,
        min_document_tokens=shortest,
        max_document_tokens=longest,
    )


class Lengths:
    """Documents of known lengths in no file."""

    prefix = "nowhere/train"

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int32)


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(20, 45)),
    st.integers(1, 50),
)
def test_pieces_are_those_of_the_documents_in_the_range(lengths, shortest, longest, context):
    documents = documents_of(Lengths(lengths), source("", shortest, longest))
    index = PieceIndex.of_shard(documents, context)
    pieces = index.pieces(np.arange(index.num_pieces))
    wanted = [
        (document, start, min(context, length - start))
        for document, length in enumerate(lengths)
        if shortest <= length and (longest is None or length <= longest)
        for start in range(0, length, context)
    ]
    assert list(zip(pieces.document, pieces.start, pieces.length)) == wanted


RUN = st.tuples(st.integers(0, 3), st.sampled_from([3, 8, 64]), st.integers(1, 20))


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(0, 10),
    st.integers(10, 30),
    st.lists(RUN, min_size=1, max_size=3),
)
def test_what_earlier_runs_read_and_left_is_of_the_range(lengths, shortest, longest, runs):
    """As if the other documents were empty."""
    documents = documents_of(Lengths(lengths), source("", shortest, longest))
    masked = Lengths([n if shortest <= n <= longest else 0 for n in lengths])
    if not sum(masked.lengths):
        return
    reads = [ReadConfig(name="a", seed=s, context_tokens=c, pieces=n) for s, c, n in runs]
    pairs = (
        (left_by(documents, reads, 5), left_by(masked, reads, 5)),
        (ReadIndex(documents, reads), ReadIndex(masked, reads)),
    )
    for index, wanted in pairs:
        assert index.num_pieces == wanted.num_pieces
        numbers = np.arange(wanted.num_pieces)
        found, expected = index.pieces(numbers), wanted.pieces(numbers)
        assert found.document.tolist() == expected.document.tolist()
        assert found.start.tolist() == expected.start.tolist()
    assert epochs_begun(documents, reads) == epochs_begun(masked, reads)


def test_ranges_of_one_corpus_have_numbers_of_their_own_on_disk(corpus):
    shard = Shard.open(corpus)
    for _ in range(2):  # the second time from the files of the first
        for shortest, longest in ((0, None), (0, 8), (9, 40), (8, None)):
            kept = [n for n in LENGTHS if shortest <= n and (longest is None or n <= longest)]
            documents = documents_of(shard, source(corpus, shortest, longest))
            assert PieceIndex.of_shard(documents, 1000).num_pieces == len(kept)
            assert PieceIndex.of_shard(documents, 1000).num_tokens == sum(kept)


def test_a_source_counts_what_it_reads(corpus):
    whole, short = SourceInfo.of(source(corpus)), SourceInfo.of(source(corpus, 2, 12))
    assert (whole.train_documents, whole.train_tokens) == (8, sum(LENGTHS))
    assert (short.train_documents, short.train_tokens) == (4, 3 + 7 + 8 + 12)
    assert identity(short) != identity(SourceInfo.of(source(corpus, 3, 12)))
    with pytest.raises(UserError, match=r"no document has 41 to 99 tokens .* have 1 to 100"):
        SourceInfo.of(source(corpus, 41, 99))


def test_a_blend_of_short_and_long_documents_of_one_corpus(corpus):
    sources = {"short": source(corpus, 0, 12), "long": source(corpus, 25, None)}
    stages = (StageConfig(blend={"short": 0.75, "long": 0.25}),)
    data = DataConfig(sources=sources, stages=stages, context_tokens=50, global_batch_tokens=100)
    shard = Shard.open(corpus)
    batches, cursor, tokens = (
        GlobalBatches(data, dict.fromkeys(sources, shard), 1),
        Cursor(),
        [0, 0],
    )
    for _ in range(40):
        batch, cursor = batches.next(cursor)
        for place, document, length in zip(batch.source, batch.document, batch.length):
            tokens[place] += int(length)
            assert (LENGTHS[document] <= 12) == (place == 0)
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_document_tokens": -1}, "sources.a.min_document_tokens = -1 must be at least 0"),
        ({"max_document_tokens": 0}, "sources.a.max_document_tokens = 0 must be at least 1"),
        ({"min_document_tokens": 9, "max_document_tokens": 8}, "= 8 must be at least 9"),
    ],
)
def test_a_range_that_is_none_is_refused(limits, said):
    data = DataConfig(sources={"a": SourceConfig(path="a", **limits)})
    with pytest.raises(UserError, match=said):
        finalize(RunConfig(data=data), {"a": 10}, VOCAB)


def test_a_held_out_set_that_sources_share_is_scored_once(corpus):
    info = replace(SourceInfo.of(source(corpus)), heldout="corpora/x/heldout")
    other = replace(info, heldout="corpora/y/heldout")
    sources = {"replay/z": info, "a": info, "b": other, "c": info, "d": replace(info, heldout=None)}
    assert [name for name, _ in scored_sources(RunConfig(), sources)] == ["a", "b"]
