"""Windows as a tokenizer: prepare, corpora, offsets, evaluation in bytes, transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_m1 import random_m1, small_book

from megascale.cli import main
from megascale.convert.score_text import TextScorer, TextTokens
from megascale.corpus.shards import Shard
from megascale.corpus.sources import describe
from megascale.corpus.tokenizer_mark import tokenizer_mark
from megascale.corpus.tokenizers import load_tokenizer
from megascale.errors import UserError
from megascale.infowindow.codebook import Codebook
from megascale.infowindow.tokenizer import CODEBOOK_FILE, InfoWindowTokenizer

TEXTS = ["def f(x):\n\treturn x\r\n", "Größe 漢字 \U0001f600\x00\x7f ", "a  b", "<|endoftext|>"]

STORY = "for i in range(10):\n    print(i)"


@settings(max_examples=60)
@given(st.text(max_size=60), st.sampled_from([256, 65536]))
def test_text_comes_back(text, vocabulary):
    tokenizer = InfoWindowTokenizer(small_book(), vocabulary)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == (np.int32 if vocabulary == 65536 else np.uint16)
    assert tokenizer.vocab_size == tokenizer.eod_id + 1 == vocabulary + 1
    assert not len(ids) or ids.max() < tokenizer.eod_id
    assert tokenizer.decode([*ids, tokenizer.eod_id, -1, 70000]) == text


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_offsets_are_characters(text):
    large = InfoWindowTokenizer(small_book(), 65536)
    ids, offsets = large.encode_with_offsets(text)
    assert (ids == large.encode(text)).all() and offsets.shape == (len(ids), 2)
    for code, (begin, end) in zip(ids, offsets):
        held = small_book().strings[code]
        raw = text[begin:end].encode()
        assert held in raw and len(raw) - len(held) <= 6 and begin < end
    if len(ids):
        assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text)
        assert (offsets[1:, 0] <= offsets[:-1, 1]).all() and (np.diff(offsets, axis=0) >= 0).all()
    small = InfoWindowTokenizer(small_book(), 256)
    assert (small.encode_with_offsets(text)[1] == np.repeat(offsets, 2, axis=0)).all()


def test_a_window_that_is_cut_off_is_left_out():
    tokenizer = InfoWindowTokenizer(small_book(), 256)
    ids = tokenizer.encode("some words")
    assert "some words".startswith(tokenizer.decode(ids[:-1])) and len(ids) % 2 == 0
    end = tokenizer.eod_id
    both = tokenizer.decode([end, *ids[:-1], end, -1, *ids, end])
    assert both == tokenizer.decode(ids[:-1]) + "some words"
    assert tokenizer.decode([end]) == tokenizer.decode([]) == ""


@pytest.mark.parametrize("vocabulary", [256, 65536])
def test_a_continuation_is_judged_by_all_that_it_changes(vocabulary):
    """The last window of a context may hold some of what follows it, and for all that may follow
    the same is judged."""
    tokenizer = InfoWindowTokenizer(small_book(), vocabulary)

    def encode(text):
        return tokenizer.encode(text).tolist()

    scorer = TextScorer(None, TextTokens(encode, tokenizer.decode, 9, 9, tokenizer.window_tokens))
    for cut in range(len(STORY)):
        context, text = STORY[:cut], STORY[cut:]
        first, second = scorer._split(context, text)
        assert first[0] == 9 and second
        assert first[1:] + second == encode(STORY)
        assert context.startswith(tokenizer.decode(first[1:]))
        for choice in ("A", "B", "C", "D", " no", "é"):
            assert scorer._split(context, choice)[0] == first


def test_plain_ac_that_was_cut_off_is_a_beginning():
    """As a model draws it, in the samples of a run."""
    book = Codebook.compile(random_m1(layers=1), "plain", 0, print)
    for vocabulary in (256, 65536):
        tokenizer = InfoWindowTokenizer(book, vocabulary)
        ids = tokenizer.encode("some words that follow")
        assert tokenizer.decode(ids) == "some words that follow"
        assert tokenizer.decode(ids[: len(ids) // 2]).startswith("some w")


@pytest.mark.parametrize("kind", [list, iter, tuple, np.array])
def test_ids_may_come_in_any_way(kind):
    tokenizer = InfoWindowTokenizer(small_book(), 65536)
    ids = [int(one) for one in tokenizer.encode("some words")]
    assert tokenizer.decode(kind([65536, *ids, -1, 65536])) == "some words"
    assert tokenizer.decode(kind([-1])) == ""


def prepare(tmp_path, name, *words):
    status = main(["prepare", str(recipe(tmp_path)), "--out", str(tmp_path / name), *words])
    return status, tmp_path / name


def recipe(tmp_path):
    rows = [f"{text} {i} ".ljust(50) * (i % 9 + 1) for i in range(60) for text in TEXTS]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "texts.jsonl").write_text(lines)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: x\nheldout_fraction: 0.2\ntokenizer: {{kind: bpe, vocab_size: 300}}\n"
        f"inputs: [{{kind: jsonl, paths: ['{tmp_path}/texts.jsonl']}}]\n"
    )
    return path


def tree(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_corpus_in_windows_is_the_same_by_any_number_of_processes(tmp_path, capsys):
    small_book().save(tmp_path / "b16.safetensors")
    chosen = f"--tokenizer=infowindow:{tmp_path / 'b16.safetensors'}"
    status, one = prepare(tmp_path, "one", chosen, "--processes", "1")
    assert status == 0 and "tokenizer infowindow, 65,537 ids" in capsys.readouterr().out
    status, two = prepare(tmp_path, "two", chosen, "--processes", "2")
    assert status == 0
    first, second = tree(one), tree(two)
    facts = json.loads(first.pop("corpus.json")), json.loads(second.pop("corpus.json"))
    assert first == second and facts[0]["files"] == facts[1]["files"]
    status, small = prepare(tmp_path, "small", chosen, "tokenizer.vocab_size=256")
    status, plain = prepare(tmp_path, "bytes", "--tokenizer", "bytes")
    large, half, raw = (load_tokenizer(folder) for folder in (one, small, plain))
    assert (large.vocab_size, half.vocab_size) == (65537, 257)
    marks = [tokenizer_mark(folder) for folder in (one, two, small)]
    assert marks[0] == marks[1] != marks[2]
    for part in ("train", "heldout"):
        shards = [Shard.open(folder / part) for folder in (one, small, plain)]
        for i in range(shards[0].num_documents):
            tokens = [shard.read(i) for shard in shards]
            assert [row[-1] for row in tokens] == [65536, 256, 256]
            pair = tokens[1][:-1].astype(np.int32)
            assert (tokens[0][:-1] == pair[::2] * 256 + pair[1::2]).all()
            text = raw.decode(tokens[2][:-1])
            assert large.decode(tokens[0]) == half.decode(tokens[1]) == text
    sizes = np.load(one / "heldout.bytes.npy")
    assert sizes.tolist() == np.load(plain / "heldout.bytes.npy").tolist()
    assert describe(str(one)).train_bytes == describe(str(plain)).train_bytes


@pytest.mark.parametrize(
    "words,said",
    [
        (["--tokenizer", "infowindow"], "tokenizer.path is needed for kind infowindow: a codebook"),
        (
            ["--tokenizer", "infowindow:no.such"],
            "no.such: no such file; make it with megascale inf",
        ),
        (["--tokenizer", "windows:x"], "tokenizer.kind must be one of bytes, bpe, hf, infowindow"),
        (
            ["--tokenizer=infowindow:B24", "tokenizer.vocab_size=65536"],
            "windows of 24 bits cannot be cut into tokens of 16 bits; take a vocabulary of 256",
        ),
        (
            ["--tokenizer=infowindow:B24", "tokenizer.vocab_size=1000"],
            "tokenizer.vocab_size must be 256 or 65536 for kind infowindow",
        ),
        (["--tokenizer=infowindow:B24", "tokenizer.eod_token=x"], "eod_token means nothing for ki"),
    ],
)
def test_bad_input_of_prepare_is_one_line(tmp_path, capsys, words, said):
    Codebook.compile(random_m1(layers=1), "ac", 24, print).save(tmp_path / "B24")
    words = [word.replace("B24", str(tmp_path / "B24")) for word in words]
    status, out = prepare(tmp_path, "out", *words)
    error = capsys.readouterr().err
    assert status == 2 and said in error and error.count("\n") == 1 and not out.exists()


def test_another_codebook_at_home_is_another_corpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("--tokenizer", "infowindow:~/book", "--processes", "1")
    for scale, status, said in ((0.3, 0, "prepared"), (0.2, 2, "from another recipe or other")):
        Codebook.compile(random_m1(layers=1, scale=scale), "ac", 24, print).save(tmp_path / "book")
        assert prepare(tmp_path, "out", *words)[0] == status
        assert said in "".join(capsys.readouterr())


def test_windows_without_a_dictionary_make_a_corpus_too(tmp_path):
    for bits in (24, 32):
        Codebook.compile(random_m1(layers=1), "ac", bits, print).save(tmp_path / "book")
        tokenizer = InfoWindowTokenizer.load(tmp_path / "book")
        assert tokenizer.eod_id == (256 if bits == 24 else 65536)
        ids = tokenizer.encode_batch(TEXTS)
        assert [tokenizer.decode(one) for one in ids] == TEXTS
    with pytest.raises(UserError, match="offsets are known for codes with a dictionary"):
        tokenizer.encode_with_offsets("a")


@pytest.mark.parametrize("vocabulary", [256, 65536])
def test_transformers_loads_what_export_writes(tmp_path, vocabulary):
    from transformers import AutoTokenizer

    from megascale.convert.huggingface.tokenizer_folder import write_tokenizer

    small_book().save(tmp_path / "b16")
    chosen = f"--tokenizer=infowindow:{tmp_path / 'b16'}"
    status, corpus = prepare(tmp_path, "corpus", chosen, f"tokenizer.vocab_size={vocabulary}")
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(corpus, out, 64)
    ours = load_tokenizer(corpus)
    theirs = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eod_id == vocabulary
    assert theirs.model_max_length == 64 and len(theirs) == vocabulary + 1
    for text in TEXTS[:3]:
        ids = theirs(text)["input_ids"]
        assert ids == [ours.eod_id, *ours.encode(text).tolist()]
        assert theirs.decode(ids, skip_special_tokens=True) == text
        assert theirs.decode(ids) == f"{theirs.eos_token}{text}"
        cut = [*ids[:-1], ours.eod_id, *ids[1:]]
        assert theirs.decode(cut, skip_special_tokens=True) == ours.decode(cut)
    theirs.add_tokens(["<|user|>"])
    assert theirs.decode(theirs("<|user|>hi")["input_ids"][1:]) == "<|user|>hi"
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again(TEXTS[0])["input_ids"] == theirs(TEXTS[0])["input_ids"]
    assert Path(tmp_path / "again" / CODEBOOK_FILE).is_file()


def test_codes_without_a_dictionary_are_not_exported(tmp_path):
    from megascale.convert.huggingface.tokenizer_folder import write_tokenizer

    Codebook.compile(random_m1(layers=1), "ac", 32, print).save(tmp_path / "b32")
    _, corpus = prepare(tmp_path, "corpus", f"--tokenizer=infowindow:{tmp_path / 'b32'}")
    with pytest.raises(UserError, match="only codes with a dictionary"):
        write_tokenizer(corpus, tmp_path, 64)
