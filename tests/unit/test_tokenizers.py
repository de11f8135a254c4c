"""Text to ids and back."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.corpus.tokenizers import (
    EOD_TEXT,
    ByteTokenizer,
    load_hf,
    open_tokenizer,
    token_dtype,
    train_bpe,
)
from megascale.errors import UserError

TEXTS = [
    "def encode(text):\n    return text\n" * 20,
    "Gr\u00fc\u00dfe aus K\u00f6ln \u65e5\u672c\n" * 9,
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@settings(max_examples=60)
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_bytes_and_bpe_give_the_text_back(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids
        assert not len(ids) or int(ids.max()) < tokenizer.vocab_size


def test_bytes_are_the_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("A\u00e9").tolist() == [65, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    assert tokenizer.decode([65, 0xC3, 256]) == "A\ufffd"


def test_a_spelled_out_end_of_document_does_not_end_one(bpe):
    ids = bpe.encode(f"a{EOD_TEXT}b")
    assert bpe.eod_id not in ids
    assert bpe.decode(ids) == f"a{EOD_TEXT}b"


def test_bpe_merges_and_is_the_same_every_time(bpe, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    bpe.save(tmp_path / "a")
    train_bpe(TEXTS, 300).save(tmp_path / "b")
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "ab")
    assert first == second
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_a_saved_bpe_encodes_the_same(bpe, tmp_path):
    bpe.save(tmp_path)
    again = open_tokenizer("bpe", tmp_path, bpe.eod_id)
    for one, other in zip(again.encode_batch(TEXTS), bpe.encode_batch(TEXTS)):
        assert np.array_equal(one, other)


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(UserError, match="257 or more"):
        train_bpe(TEXTS, 256)


def test_ids_are_stored_as_megatron_stores_them():
    from megatron.core.datasets.indexed_dataset import DType

    for vocab_size in (257, 65499, 65500, 128_000):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def _hf_folder(bpe, folder, **config):
    folder.mkdir()
    bpe.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_hugging_face_folder(bpe, tmp_path):
    path = _hf_folder(bpe, tmp_path / "hf", eos_token={"content": EOD_TEXT})
    tokenizer = load_hf(path)
    assert tokenizer.eod_id == bpe.eod_id
    assert np.array_equal(tokenizer.encode(TEXTS[1]), bpe.encode(TEXTS[1]))
    assert np.array_equal(load_hf(f"{path}/tokenizer.json").encode("a"), bpe.encode("a"))


def test_hugging_face_folder_read_by_transformers(bpe, tmp_path):
    from transformers import PreTrainedTokenizerFast

    _hf_folder(bpe, tmp_path / "plain")
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "plain" / "tokenizer.json"), eos_token=EOD_TEXT
    )
    fast.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "plain")
    tokenizer = load_hf(str(tmp_path / "saved"))
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    assert tokenizer.eod_id == bpe.eod_id


def test_hugging_face_needs_an_end(bpe, tmp_path):
    path = _hf_folder(bpe, tmp_path / "hf")
    with pytest.raises(UserError, match="eod_token"):
        load_hf(path)
    with pytest.raises(UserError, match="no token '<no>'"):
        load_hf(path, "<no>")
    assert load_hf(path, EOD_TEXT).eod_id == bpe.eod_id


def test_hugging_face_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub that can be reached"):
        load_hf("nobody/nothing-of-this-name")
    with pytest.raises(UserError, match="no such folder"):
        load_hf(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        load_hf(str(tmp_path))
