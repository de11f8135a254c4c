"""Text that spells a special token never becomes it, whatever the tokenizer's model makes of it."""

import numpy as np
import pytest
import tokenizer_files as made
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_m1 import small_book

from megascale.corpus.check import check_source
from megascale.corpus.shards import Shard
from megascale.corpus.sources import describe
from megascale.corpus.special_tokens import Refused
from megascale.corpus.tokenizers import ByteTokenizer, encode_each, load_hf, load_tokenizer
from megascale.errors import UserError
from megascale.infowindow.tokenizer import InfoWindowTokenizer

KINDS = {
    "merges": made.merging_bpe,
    "unigram": made.unigram,
    "unigram with bytes": lambda: made.unigram("ab ", byte_fallback=True),
    "not flagged": made.unflagged_bpe,
    "flagged": made.byte_bpe,
}
SPELLED = ["a</s>b", "<s>a</s>", "</s>", "x </s></s>> <s> <unk> </s", "<s></s>" * 50]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        name: load_hf(made.save(make(), folder / name, bos_token="<s>", pad_token="<pad>"))
        for name, make in KINDS.items()
    }


def naive_ids(tokenizer, text):
    """What the library gives, with what its model makes of special tokens."""
    return tokenizer._backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SPELLED)
def test_spelled_tokens_get_other_ids(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert not set(ids.tolist()) & {tokenizer.eod_id, *tokenizer.special_ids}
    assert tokenizer.decode(ids) == text
    if kind not in ("flagged",):
        assert tokenizer.eod_id in naive_ids(tokenizer, "a</s>b")


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_keeps_its_ids(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in [*made.TEXTS, "<b>b</b> <strike>x", "", "</ s>"]:
        assert tokenizer.encode(text).tolist() == naive_ids(tokenizer, text)


@settings(max_examples=80)
@given(parts=st.lists(st.sampled_from(["</s>", "<s>", "<pad>", "<unk>", "<", "/", "s", ">", "a "])))
def test_no_special_id_comes_out(tokenizers, parts):
    text = "".join(parts)
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text)
        assert not set(ids.tolist()) & set(tokenizer.special_ids)
        assert tokenizer.decode(ids) == text


@settings(max_examples=40)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_bytes_and_windows_have_no_special_id(text):
    windows = [InfoWindowTokenizer(small_book(), size) for size in (256, 65536)]
    for tokenizer in (ByteTokenizer(), *windows):
        (ids,) = encode_each(tokenizer, [text])
        assert tokenizer.eod_id not in ids and tokenizer.special_ids == (tokenizer.eod_id,)


def test_named_tokens_are_special_and_the_unknown_one_is_not(tokenizers):
    merges, flagged = tokenizers["merges"], tokenizers["flagged"]
    assert merges.special_ids == (0, 1) and merges.unknown_id == 2
    assert merges.encode("a\u00e9b<unk>").tolist()[1] == 2
    assert merges.decode(merges.encode("ab<unk>")) == "ab<unk>"
    assert {flagged._backend.token_to_id(one) for one in ("</s>", "<s>", "<pad>")} < set(
        flagged.special_ids
    )


def test_text_without_other_ids_is_refused(tmp_path):
    folder = made.save(made.unigram("abs "), tmp_path / "few")
    tokenizer = load_hf(folder)
    assert tokenizer.encode("ab").tolist() == [3, 4]
    good, bad = encode_each(tokenizer, ["ab", "ab sa</s>b"])
    assert good.tolist() == [3, 4] and bad == Refused(5, "</s>b")
    with pytest.raises(UserError, match="special token .* at character 1: '</s>'.* other ids"):
        tokenizer.encode("a</s>")
    texts = ["a b", "aa</s>b", "abs", "b</s>"]
    with pytest.raises(
        UserError, match="in/0001, at character 2: '</s>b': .* and so do 2 documents in all"
    ):
        made.prepare_texts(tmp_path, texts, folder)
    assert not (tmp_path / "corpus").exists()


def test_an_end_that_text_cannot_do_without_is_refused(tmp_path):
    """A token that is a character of its own: no merge or piece makes it another way."""
    tokenizer = load_hf(made.save(made.merging_bpe(), tmp_path), eod_token=".")
    (refused,) = encode_each(tokenizer, ["a.b"])
    assert refused == Refused(1, ".b")


@pytest.mark.parametrize("kind", ["merges", "unigram", "not flagged"])
def test_documents_of_a_corpus_end_once(tmp_path, kind):
    folder = made.save(KINDS[kind](), tmp_path / "tokenizer", bos_token="<s>")
    texts = [f"<p>{i} <strike>no</s> yes</s>{'a' * i}</p>" for i in range(20)]
    corpus = made.prepare_texts(tmp_path, texts, folder, heldout=0.2).folder
    tokenizer = load_tokenizer(corpus)
    found = []
    for part in ("train", "heldout"):
        shard = Shard.open(corpus / part)
        for i in range(shard.num_documents):
            tokens = shard.read(i)
            special = np.isin(tokens, tokenizer.special_ids)
            assert special.tolist() == [False] * (len(tokens) - 1) + [True]
            found.append(tokenizer.decode(tokens))
    assert sorted(found) == sorted(texts)
    assert check_source(describe(str(corpus))).faults == []


def test_check_finds_special_tokens_of_before(tmp_path):
    folder = made.save(made.unigram(), tmp_path / "tokenizer", bos_token="<s>")
    corpus = made.prepare_texts(tmp_path, ["abc", "def", "ghi"], folder, heldout=0.0).folder
    raw = np.fromfile(corpus / "train.bin", np.uint16)
    raw[5] = 1  # in the middle of the second document: <s>
    raw.tofile(corpus / "train.bin")
    faults = check_source(describe(str(corpus))).faults
    assert any(
        one.startswith("1 documents with another special token") and "train document 1" in one
        for one in faults
    )


def test_words_and_their_pieces(tmp_path):
    """A word that is a special token is made of its pieces; a model of whole words has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["[UNK]", "[END]", "[", "##E", "##N", "##D", "##]", "a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    tokenizer = load_hf(made.save(backend, tmp_path / "pieces"), eod_token="[END]")
    assert tokenizer.encode("a [END] b").tolist() == [7, 2, 3, 4, 5, 6, 0]
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_hf(made.save(words, tmp_path / "words"), eod_token="[END]")
    assert tokenizer.encode("a b").tolist() == [2, 0]
    assert list(encode_each(tokenizer, ["a [END] b"])) == [Refused(2, "[END] b")]


def test_a_text_that_knows_the_other_names_is_refused(tokenizers):
    """The copy without special tokens has them under names that hold U+FFFF."""
    text = "</s>\uffff2\uffff"
    (ids,) = encode_each(tokenizers["unigram"], [text])
    assert isinstance(ids, Refused) and ids.place == 4


def test_an_unknown_token_that_ends_documents_is_refused(tmp_path):
    tokenizer = load_hf(made.save(made.unigram("ab"), tmp_path), eod_token="<unk>")
    assert list(encode_each(tokenizer, ["axb"])) == [Refused(1, "xb")]
