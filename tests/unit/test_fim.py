"""Fill-in-the-middle: documents come back bit-equal, from any slices, and shares are as asked."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizer_files as made
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config import DataConfig, ModelConfig, RunConfig, SourceConfig, StageConfig
from megascale.config.schema import FillInMiddleConfig
from megascale.corpus.batches import Cursor, GlobalBatches
from megascale.corpus.fim import FEWEST_TOKENS, BlockRule, FimReader, Sentinels
from megascale.corpus.pieces import documents_of
from megascale.corpus.shards import Shard, writing
from megascale.corpus.sources import SourceInfo, identity, training_documents
from megascale.errors import UserError
from megascale.mesh.reader import TokenSource
from megascale.run.checkpoint_tokenizer import tokenizer_folder
from megascale.run.fim import require_usable_sentinels, with_fim

EOD, MARKS = 50, Sentinels(51, 52, 53)


class InMemory:
    """Documents that lie in no file."""

    prefix = "nowhere/train"

    def __init__(self, documents):
        self.documents = [np.asarray(one, np.uint16) for one in documents]
        self.lengths = np.array([len(one) for one in documents], np.int32)

    def read(self, document, start=0, count=None):
        """As `Shard.read`."""
        count = len(self.documents[document]) - start if count is None else count
        return self.documents[document][start : start + count]


def undone(tokens, block_tokens):
    """What was stored, of a document as it is read; and the orders of its transformed blocks."""
    stored, orders = [], []
    for begin in range(0, len(tokens), block_tokens):
        block = list(tokens[begin : begin + block_tokens])
        if block[:1] != [MARKS.prefix]:
            stored += block
            continue
        ended = [block.pop()] if block[-1] == EOD else []
        suffix, middle = block.index(MARKS.suffix), block.index(MARKS.middle)
        if suffix == 1:  # an empty prefix in PSM is the same tokens
            orders.append("spm")
            after, rest = block[2:middle], block[middle + 1 :]
            stored += [*rest, *after, *ended]
        else:
            orders.append("psm")
            stored += [
                *block[1:suffix],
                *block[middle + 1 :],
                *block[suffix + 1 : middle],
                *ended,
            ]
    return stored, orders


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 120), min_size=1, max_size=5),
    st.sampled_from([11, 12, 16, 40, 200]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.data(),
)
def test_a_document_comes_back_and_every_slice_is_of_the_whole(lengths, block, rate, ends, data):
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(0, EOD, length) for length in lengths]
    if ends:
        documents = [np.append(one, EOD) for one in documents]
    shard, rule = InMemory(documents), BlockRule(rate, 0.5, block)
    reader, read = FimReader(shard, rule, MARKS, EOD), rule.lengths(shard.lengths)
    for number, document in enumerate(documents):
        whole = reader.read(number, 0, int(read[number]))
        assert len(whole) == read[number]
        assert undone(whole, block)[0] == document.tolist()
        if ends:
            assert whole[-1] == EOD
        if rate == 0 or len(document) < FEWEST_TOKENS:
            assert whole.tolist() == document.tolist()
        begin = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(begin, len(whole)))
        assert reader.read(number, begin, end - begin).tolist() == whole[begin:end].tolist()
        with pytest.raises(IndexError):
            reader.read(number, 0, len(whole) + 1)


def test_lengths_do_not_depend_on_where_they_begin():
    rule, stored = BlockRule(0.5, 0.5, 16), np.arange(100)
    assert np.concatenate([rule.lengths(stored[:37]), rule.lengths(stored[37:], 37)]).tolist() == (
        rule.lengths(stored).tolist()
    )


def test_shares_of_blocks_and_orders_are_those_asked_for():
    documents = [np.append(np.arange(40) % EOD, EOD)] * 4000
    rule, shard = BlockRule(0.4, 0.25, 64), InMemory(documents)
    reader, read = FimReader(shard, rule, MARKS, EOD), rule.lengths(shard.lengths)
    orders = [
        order
        for number in range(len(documents))
        for order in undone(reader.read(number, 0, int(read[number])), 64)[1]
    ]
    assert len(orders) / 4000 == pytest.approx(0.4, abs=0.03)
    # of 42 places for a cut, two fall on the first in 1 - (40 / 41)^2 of blocks: PSM like SPM
    alike = 0.25 + 0.75 * (1 - (40 / 41) ** 2)
    assert orders.count("spm") / len(orders) == pytest.approx(alike, abs=0.03)
    first = [reader.read(n, 0, int(read[n])).tolist() for n in np.flatnonzero(read > 41)[:50]]
    assert len({tuple(one) for one in first}) > 45  # the cuts differ from document to document


@pytest.fixture
def corpus(tmp_path):
    """The prefix of a shard of 40 documents."""
    rng = np.random.default_rng(0)
    with writing(tmp_path / "train", np.uint16) as writer:
        for _ in range(40):
            writer.add(np.append(rng.integers(0, EOD, rng.integers(3, 90)), EOD))
    return str(tmp_path / "train")


def source(corpus, **fim):
    """A source of that corpus, finalized for a context of 32 tokens."""
    ids = dict(zip(("prefix_id", "suffix_id", "middle_id"), MARKS, strict=True))
    one = SourceConfig(
        path=corpus, vocab_size=54, eod_id=EOD, fim=FillInMiddleConfig(**{**ids, **fim})
    )
    return resolved(one)


def resolved(one):
    """A source with all values of its fill-in-the-middle."""
    data = DataConfig(sources={"code": one}, context_tokens=32)
    return with_fim(RunConfig(data=data)).data.sources["code"]


def test_an_epoch_reads_every_document_once_and_whole(corpus):
    code, shard = source(corpus, rate=0.7), Shard.open(corpus)
    documents = documents_of(shard, code)
    info = SourceInfo.of(code)
    assert info.train_tokens == int(documents.lengths.sum()) > shard.num_tokens
    reading = TokenSource("code", training_documents(code, info), EOD, 54)
    data = DataConfig(
        sources={"code": code},
        stages=(StageConfig(blend={"code": 1.0}),),
        context_tokens=32,
        global_batch_tokens=info.train_tokens,
    )
    batch, _ = GlobalBatches(data, {"code": shard}, 0).next(Cursor())
    read = [dict() for _ in range(shard.num_documents)]
    for document, start, length in zip(batch.document, batch.start, batch.length, strict=True):
        read[document][int(start)] = reading.read(int(document), int(start), int(length))
    for number, pieces in enumerate(read):
        ordered = [pieces[start] for start in sorted(pieces)]
        targets = np.concatenate([one.targets for one in ordered])
        inputs = np.concatenate([one.inputs for one in ordered])
        assert undone(targets, 32)[0] == shard.read(number).tolist()
        assert inputs.tolist() == [EOD, *targets[:-1]]  # also across pieces
    assert any(MARKS.middle in one.targets for pieces in read for one in pieces.values())


def test_another_rule_is_another_source_for_a_run_that_goes_on(corpus):
    plain = SourceConfig(path=corpus, vocab_size=54, eod_id=EOD)
    configs = [plain, source(corpus), source(corpus, rate=0.25), source(corpus, spm=1.0)]
    assert len({identity(SourceInfo.of(one)) for one in configs}) == len(configs)
    assert identity(SourceInfo.of(source(corpus))) == identity(SourceInfo.of(source(corpus)))


@pytest.mark.parametrize(
    ("fim", "words"),
    [
        ({"rate": 1.5}, r"fim.rate = 1.5 must be a share"),
        ({"spm": float("nan")}, r"fim.spm = nan must be a share"),
        ({"block_tokens": 12}, r"block_tokens = 12 .* divide data.context_tokens = 32"),
        ({"block_tokens": 8}, r"block_tokens = 8 must be at least 11"),
        ({"middle_id": None}, r"middle_id is missing"),
        ({"middle_id": 51}, r"51, 52, 51 .* three different"),
        ({"prefix_id": -1}, r"-1, 52, 53 .* at least 0"),
        (dict.fromkeys(("prefix_id", "suffix_id", "middle_id")), r"no prepared corpus"),
    ],
)
def test_what_cannot_work_is_one_line(corpus, fim, words):
    with pytest.raises(UserError, match=words):
        source(corpus, **fim)


@pytest.mark.parametrize(
    ("vocab_size", "eod_id", "bos_id", "words"),
    [
        (54, 99, None, None),
        (53, 99, None, "id 53 of a sentinel is outside model.vocab_size = 53"),
        (54, 52, None, "id 52 of a sentinel begins or ends the documents"),
        (54, 99, 51, "id 51 of a sentinel begins or ends the documents"),
    ],
)
def test_sentinels_have_a_row_and_mark_nothing_else(corpus, vocab_size, eod_id, bos_id, words):
    code = source(corpus)
    info = replace(SourceInfo.of(code), eod_id=eod_id, bos_id=bos_id)
    config = RunConfig(
        model=ModelConfig(vocab_size=vocab_size), data=DataConfig(sources={"code": code})
    )
    if words is None:
        return require_usable_sentinels(config, {"code": info})
    with pytest.raises(UserError, match=words):
        require_usable_sentinels(config, {"code": info})


def test_sentinels_of_the_tokenizer(tmp_path):
    plain = made.byte_bpe()
    without = made.prepare_texts(tmp_path / "a", made.TEXTS, made.save(plain, tmp_path / "plain"))
    spelled = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    plain.add_special_tokens(list(spelled))
    tokenizer = made.save(plain, tmp_path / "fim")
    corpus = made.prepare_texts(tmp_path / "b", made.TEXTS, tokenizer)
    fim = resolved(SourceConfig(path=str(corpus.folder), fim=FillInMiddleConfig())).fim
    ids = [plain.token_to_id(one) for one in spelled]
    assert [fim.prefix_id, fim.suffix_id, fim.middle_id] == ids
    assert fim.block_tokens == 32
    with pytest.raises(UserError, match=r"has no sentinels such as <fim_prefix>.*prefix_id"):
        resolved(SourceConfig(path=str(without.folder), fim=FillInMiddleConfig()))


def test_a_checkpoint_finds_its_corpus_whatever_part_of_it_was_read(tmp_path):
    corpus = made.prepare_texts(tmp_path, made.TEXTS, made.save(made.byte_bpe(), tmp_path / "t"))
    ids = FillInMiddleConfig(prefix_id=310, suffix_id=311, middle_id=312)
    path = str(corpus.folder)
    for one in (
        SourceConfig(path=path),
        SourceConfig(path=path, min_document_tokens=2),
        resolved(SourceConfig(path=path, fim=ids)),
    ):
        held = {"code": identity(SourceInfo.of(one))}
        found = SimpleNamespace(
            folder=tmp_path,
            manifest=SimpleNamespace(position=SimpleNamespace(cursor={"sources": held})),
        )
        config = RunConfig(data=DataConfig(sources={"code": one}))
        assert tokenizer_folder(found, config, None) == corpus.folder
        held["code"] = "other text"
        with pytest.raises(UserError, match=r"held other text when the checkpoint was written"):
            tokenizer_folder(found, config, None)
