"""Tokenizers that drop or change text: prepare says so, and bits per byte do not profit."""

import json

import numpy as np
import pytest
import tokenizer_files as made

from megascale.commands.prepare import summary
from megascale.corpus.check import check_source
from megascale.corpus.outcomes import Fates, returned_train_bytes
from megascale.corpus.round_trip import (
    SAMPLED_PLACES,
    compare_texts,
    first_difference,
    is_drawn,
    stride_of,
)
from megascale.corpus.shards import Shard
from megascale.corpus.sources import describe
from megascale.corpus.tokenizers import load_tokenizer
from megascale.errors import UserError


def dropping_bpe():
    """No unknown token and no bytes: what it does not know is gone."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {one: i for i, one in enumerate(["</s>", *"abcdefghij "])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return backend


def lowering_bpe():
    from tokenizers import normalizers

    backend = made.byte_bpe(begin=None)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return backend


@pytest.mark.parametrize(
    "text, decoded, returned, place",
    [
        ("abc", "abc", 3, None),
        ("abXc", "abc", 3, 2),
        ("ABab", "abab", 2, 0),  # the capitals do not come back; two of four a and b do
        ("caf\u00e9", "caf\ufffd", 3, 3),
        ("e\u0301", "\u00e9", 0, 0),
        ("ab", "a b", 2, 1),  # what is added is not counted
        ("abc", "", 0, 0),
        ("\U0001f600a", "a", 1, 0),
    ],
)
def test_bytes_that_come_back(text, decoded, returned, place):
    trip = compare_texts(text, decoded)
    assert (trip.num_bytes, trip.returned_bytes, trip.place) == (
        len(text.encode()),
        returned,
        place,
    )


def test_first_difference_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, two = ("".join(rng.choice(["a", "b"], rng.integers(0, 9))) for _ in range(2))
        if one != two:
            pairs = list(zip(one, two))
            slow = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
            assert first_difference(one, two) == slow


TEXTS = [f"abc {'j' * i} def" for i in range(30)]


def test_a_tokenizer_that_drops_bytes(tmp_path):
    texts = [*TEXTS, "abcXYZ", "aaQ\u00e9"]
    prepared = made.prepare_texts(
        tmp_path, texts, made.save(dropping_bpe(), tmp_path / "t"), heldout=0.3
    )
    trip, corpus = prepared.facts["round_trip"], prepared.folder
    total = sum(len(text.encode()) for text in texts)
    assert (trip["documents"], trip["changed"]) == (32, 2)
    assert (trip["bytes"], trip["returned_bytes"]) == (total, total - 6)
    assert trip["first_changed"] == {
        "document": str(tmp_path / "in" / "0030"),
        "character": 3,
        "text": "XYZ",
        "decoded": "",
        "cause": "the tokenizer drops or changes some of it",
    }
    said = summary(prepared)
    assert "2 of 32 documents do not decode to the text they were made from; the first is" in said
    assert "in/0030, at character 3: 'XYZ' comes back as ''" in said
    notes = check_source(describe(str(corpus))).notes
    share = f"{(total - 6) / total:.2%}"
    assert any(f"were decoded: {share} of the bytes come back" in note for note in notes)


def test_bits_per_byte_do_not_profit(tmp_path):
    """The model never predicts what is dropped: such bytes are not counted, wherever bytes are."""
    texts = [f"{text}{'Z' * 40}" for text in TEXTS]  # more than half of it is dropped
    folder = made.save(dropping_bpe(), tmp_path / "t")
    prepared = made.prepare_texts(tmp_path / "lossy", texts, folder, heldout=0.3)
    plain = made.prepare_texts(tmp_path / "plain", TEXTS, folder, heldout=0.0)
    info = describe(str(prepared.folder))
    heldout, tokenizer = Shard.open(info.heldout), load_tokenizer(prepared.folder)
    coded = [len(tokenizer.decode(heldout.read(i))) for i in range(heldout.num_documents)]
    assert heldout.num_documents > 3 and np.load(info.heldout_bytes).tolist() == coded
    train = Shard.open(info.train)
    source_bytes = prepared.facts["train"]["bytes"]
    assert info.train_bytes == train.num_tokens - train.num_documents
    assert source_bytes == info.train_bytes + 40 * train.num_documents
    # the figure is that of the text that is coded, not less than half of it
    own = plain.facts["unigram_bits_per_byte"]
    assert prepared.facts["unigram_bits_per_byte"] == pytest.approx(own, rel=0.1)


def test_a_normaliser_is_named(tmp_path):
    texts = ["plain text", "Upper Case", "cafe\u0301"]
    prepared = made.prepare_texts(tmp_path, texts, made.save(lowering_bpe(), tmp_path / "t"))
    trip = prepared.facts["round_trip"]
    assert trip["changed"] == 2 and trip["returned_bytes"] == trip["bytes"] - 2 - 3
    first = trip["first_changed"]
    assert (first["character"], first["text"], first["decoded"]) == (0, "Upper Case", "upper case")
    assert first["cause"] == "the tokenizer's normaliser changes text"


def test_unknown_tokens_are_counted(tmp_path):
    texts = ["abc", "a\u00e9b\u00e8", "\u00e9"]
    folder = made.save(made.unigram("abc "), tmp_path / "t")
    prepared = made.prepare_texts(tmp_path, texts, folder)
    trip = prepared.facts["round_trip"]
    assert trip["unknown_tokens"] == 3 and trip["changed"] == 2
    assert trip["first_changed"]["cause"] == "the tokenizer has no ids for some of it"
    assert "3 tokens of train are the tokenizer's unknown token" in summary(prepared)
    notes = check_source(describe(str(prepared.folder))).notes
    assert any(note.startswith("2 documents with the tokenizer's unknown token") for note in notes)


def test_a_tokenizer_that_gives_nothing_back(tmp_path):
    folder = made.save(dropping_bpe(), tmp_path / "t")
    with pytest.raises(UserError, match="no text comes back"):
        made.prepare_texts(tmp_path, ["XYZ", "XXX"], folder)


LONG = 70_000


def test_losses_anywhere_in_long_documents_count_without_a_held_out_set(tmp_path):
    """Their first 65,536 characters come back whole."""
    texts = [f"{'a' * i}{'b' * LONG}{'X' * 2 * LONG}" for i in range(12)]
    prepared = made.prepare_texts(tmp_path, texts, made.save(dropping_bpe(), tmp_path / "t"))
    facts, kept = prepared.facts, 12 * LONG + sum(range(12))
    assert facts["heldout"]["documents"] == 0
    assert (facts["round_trip"]["changed"], facts["round_trip"]["documents"]) == (12, 12)
    assert facts["round_trip"]["first_changed"]["character"] == LONG
    info = describe(str(prepared.folder))
    assert info.train_bytes == facts["train"]["returned_bytes"] == kept
    assert kept < info.train_tokens == kept + 12
    said = summary(prepared)
    assert "12 of 12 documents do not decode" in said
    share = f"{kept / (kept + 24 * LONG):.2%}"
    assert f"All documents were decoded: {share} of the bytes come back" in said


def sampled(lengths, returned, stride, rng):
    """Fates of documents of train, decoded by a sample."""
    lows = rng.integers(0, 2**64, len(lengths), dtype=np.uint64)
    drawn = [is_drawn(int(low), int(size), stride) for low, size in zip(lows, lengths)]
    yes = np.ones(len(lengths), dtype=bool)
    weight = np.where(drawn, np.maximum(lengths, stride), 0)
    back = np.where(drawn, returned, 0)
    verdict = np.zeros(len(lengths), dtype=np.int8)
    return Fates(verdict, ~yes, yes, ~yes, lengths, weight, back, lengths > returned)


def test_a_sample_is_right_for_documents_of_any_length():
    """Long documents lose most of their text, and short ones a little."""
    rng = np.random.default_rng(1)
    lengths = np.concatenate([rng.integers(20, 2000, 4000), [300_000, 50_000, 2_000_000]])
    returned = np.where(lengths > 1000, lengths // 4, lengths - 1)
    total = int(lengths.sum())
    stride = stride_of(total, "bpe")
    fates = [sampled(lengths, returned, stride, rng) for _ in range(200)]
    shares = np.array([returned_train_bytes(one) / total for one in fates])
    truth = returned.sum() / total
    assert abs(shares.mean() - truth) < 4 * shares.std() / 200**0.5 < 0.005
    assert shares.std() < 0.03 and all((one.weight > 0)[-3:].all() for one in fates)
    assert 500 < np.mean([(one.weight > 0).sum() for one in fates]) < SAMPLED_PLACES


def test_what_was_sampled_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("megascale.corpus.round_trip.WHOLE_BYTES", 10_000)
    monkeypatch.setattr("megascale.corpus.round_trip.SAMPLED_PLACES", 20)
    texts = [f"{'a' * i}{'X' * 100}" for i in range(300)]
    texts += ["a" * 50_000 + "X" * 50_000]
    folder = made.save(dropping_bpe(), tmp_path / "t")
    prepared = made.prepare_texts(tmp_path, texts, folder, heldout=0.02)
    facts, trip = prepared.facts, prepared.facts["round_trip"]
    heldout = facts["heldout"]["documents"]
    assert 0 < heldout < trip["documents"] == trip["changed"] < 60
    total = facts["train"]["bytes"] + facts["heldout"]["bytes"]
    kept = sum(text.count("a") for text in texts)
    returned = facts["train"]["returned_bytes"] + facts["heldout"]["returned_bytes"]
    assert returned / total == pytest.approx(kept / total, rel=0.15)
    assert (
        facts["heldout"]["returned_bytes"] == np.load(prepared.folder / "heldout.bytes.npy").sum()
    )
    assert (
        f"{trip['documents']} of 301 documents were decoded ({heldout} held-out ones, and of the "
        f"others a sample in proportion to their length): about {returned / total:.2%} of the bytes"
    ) in summary(prepared)
    again = made.prepare_texts(tmp_path / "2", texts, folder, heldout=0.02, processes=2)
    assert again.facts["round_trip"]["documents"] == trip["documents"]


def test_a_sample_of_an_earlier_version_is_named(tmp_path):
    prepared = made.prepare_texts(
        tmp_path, ["abc", "ab"], made.save(dropping_bpe(), tmp_path / "t")
    )
    path, now = prepared.folder / "corpus.json", describe(str(prepared.folder))
    facts = json.loads(path.read_text())
    for part in ("train", "heldout"):
        del facts[part]["returned_bytes"]
    path.write_text(json.dumps(facts))
    assert describe(str(prepared.folder)) == now
    assert any("prepare the corpus again with --force" in one for one in check_source(now).notes)


@pytest.mark.parametrize("value", [0, -1, 5.0, 10**9])
def test_a_damaged_count_is_refused(tmp_path, value):
    prepared = made.prepare_texts(
        tmp_path, ["abc", "ab"], made.save(dropping_bpe(), tmp_path / "t")
    )
    path = prepared.folder / "corpus.json"
    facts = json.loads(path.read_text())
    facts["train"]["returned_bytes"] = value
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="not a corpus file of format 1"):
        describe(str(prepared.folder))


def test_a_corpus_of_before_has_no_such_record(tmp_path):
    prepared = made.prepare_texts(
        tmp_path, ["abc", "ab"], made.save(dropping_bpe(), tmp_path / "t")
    )
    path = prepared.folder / "corpus.json"
    now = describe(str(prepared.folder))
    facts = json.loads(path.read_text())
    del facts["round_trip"], facts["tokenizer"]["bos_id"], facts["tokenizer"]["special_ids"]
    del facts["train"]["returned_bytes"], facts["heldout"]["returned_bytes"]
    path.write_text(json.dumps(facts))
    assert describe(str(prepared.folder)) == now
    assert check_source(now).faults == []
