"""Which part of a held-out set is scored, and how many bytes of text that is."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_m1 import small_book

from megascale.corpus.heldout import HeldoutPart, _Text, choose_part, spans_of
from megascale.corpus.prepare import prepare
from megascale.corpus.recipe import parse_recipe
from megascale.corpus.shards import Shard, writing
from megascale.corpus.sources import describe
from megascale.corpus.tokenizers import load_tokenizer, train_bpe
from megascale.errors import UserError


@dataclass
class Lengths:
    """A shard of which only the lengths are known."""

    lengths: np.ndarray
    prefix: str = field(default_factory=lambda: f"{mkdtemp()}/heldout")


def shard(*lengths):
    return Lengths(np.array(lengths, dtype=np.int32))


def part_of(source, context, tokens):
    spans = spans_of(source, context, tokens)
    return HeldoutPart(spans, None, int(source.lengths.sum()), len(source.lengths))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    st.integers(1, 700),
    st.integers(1, 40_000),
)
def test_as_many_tokens_as_asked_for(lengths, context, tokens):
    source = shard(*lengths)
    part = part_of(source, context, tokens)
    assert part.tokens == min(tokens, sum(lengths))
    document, start, length = part.spans_n3.T
    assert (length > 0).all() and (start + length <= source.lengths[document]).all()
    order = np.lexsort((start, document))
    assert (order == np.arange(len(order))).all()
    same = document[1:] == document[:-1]
    assert (start[1:][same] > (start + length)[:-1][same]).all()  # apart, so none is read twice
    pieces = part.pieces(context)
    assert pieces.length.sum() == part.tokens and pieces.length.max(initial=0) <= context
    assert (part_of(source, context, tokens).spans_n3 == part.spans_n3).all()
    back = HeldoutPart.from_bytes(part.to_bytes())
    assert back.mark == part.mark and (back.spans_n3 == part.spans_n3).all()
    assert (back.num_bytes, back.set_tokens) == (None, sum(lengths))


def test_all_of_a_set_that_fits_is_scored():
    """Of these 36,546 tokens 1,074 were scored when 40,000 were asked for."""
    source = shard(*[179] * 6, *[5912] * 6)
    part = part_of(source, 1024, 40_000)
    assert (part.tokens, part.documents) == (36_546, 12)
    pieces = part.pieces(1024)
    assert pieces.length.tolist() == [179] * 6 + ([1024] * 5 + [792]) * 6
    assert pieces.start.tolist() == [0] * 6 + [0, 1024, 2048, 3072, 4096, 5120] * 6


def test_long_documents_are_scored_within_the_budget():
    part = part_of(shard(*[179] * 6, *[5912] * 6), 1024, 20_000)
    assert part.tokens == 20_000
    assert part.spans_n3[part.spans_n3[:, 0] >= 6, 2].sum() > 15_000
    assert part_of(shard(1000), 16, 10).tokens == 10
    assert part_of(shard(60_000, 60_000, 60_000), 1024, 20_000).documents == 3


def test_every_token_is_as_likely_as_any_other():
    """A giant of half of the tokens gives half; documents and places come from all over."""
    source = shard(*[500] * 1000, 500_000)
    part = part_of(source, 256, 100_000)
    document, start, length = part.spans_n3.T
    assert 0.4 < length[document == 1000].sum() / part.tokens < 0.6
    assert 40_000 < start[document == 1000].min() + start[document == 1000].max() - 500_000 + 1e5
    assert 400 < np.median(document[document < 1000]) < 600
    assert 80 < part.documents < 130


def test_more_tokens_keep_the_documents_there_are():
    source = Lengths(np.random.default_rng(3).integers(1, 200, 500))
    few, more = (set(spans_of(source, 16, n)[:, 0].tolist()) for n in (800, 3000))
    assert few < more


def test_nothing_is_chosen_where_there_is_nothing():
    assert spans_of(shard(1000), 16, 0).shape == (0, 3)
    assert spans_of(shard(), 16, 10).shape == (0, 3)
    assert spans_of(shard(0, 0), 16, 10).shape == (0, 3)


LETTERS = "漢字 Größe \U0001f600 a  bc\n é\u0301 ελ "


def texts():
    """Documents of characters of one to four bytes, short and long."""
    draws = np.random.default_rng(0)
    rest = ["".join(draws.choice(list(LETTERS), 10 + 60 * (i % 30))) for i in range(90)]
    return [f"{i}{text}" for i, text in enumerate(rest)]


def make(folder, tokenizer):
    """A corpus of these texts, half of them held out; its folder."""
    lines = [json.dumps({"text": text}) for text in texts()]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    recipe = parse_recipe(
        f"name: x\nheldout_fraction: 0.5\ntokenizer: {tokenizer}\n"
        f"inputs: [{{kind: jsonl, paths: ['{folder}/texts.jsonl']}}]\n"
    )
    return prepare(recipe, folder / "made", processes=1).folder


def hf_tokenizer(folder, **changes):
    """A byte-level BPE of Hugging Face's library, changed."""
    made = train_bpe(texts()[:20], 270)
    for name, value in changes.items():
        setattr(made._backend, name, value)
    folder.mkdir()
    made.save(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return f"{{kind: hf, path: {folder}}}"


def tokenizer_of(kind, folder):
    from tokenizers import decoders, pre_tokenizers

    if kind.startswith("windows"):
        (folder / "book").mkdir()
        small_book().save(folder / "book" / "codebook.safetensors")
        size = kind.removeprefix("windows of ")
        return f"{{kind: infowindow, path: {folder}/book, vocab_size: {size}}}"
    if kind == "prefix space":  # as sentencepiece: the first token of what is decoded loses it
        changes = {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.ByteLevel(add_prefix_space=True)]
            ),
            "decoder": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        }
        return hf_tokenizer(folder / "hf", **changes)
    return {"bytes": "{kind: bytes}", "bpe": "{kind: bpe, vocab_size: 262}"}[kind]


def bytes_of_ids(tokenizer, ids):
    """Bytes of text that ids stand for, each by itself."""
    if tokenizer.kind == "bytes":
        return sum(1 for one in ids if one < 256)
    if tokenizer.kind == "infowindow" and tokenizer.eod_id == 65536:
        return sum(len(small_book().strings[one]) for one in ids if one < 65536)
    if tokenizer.kind == "infowindow":
        assert len(ids) % 2 == 0 or ids[-1] == 256
        codes = ids[: len(ids) // 2 * 2].reshape(-1, 2).astype(int) @ [256, 1]
        return sum(len(small_book().strings[one]) for one in codes)
    return sum(len(tokenizer._backend.id_to_token(int(i))) for i in ids if i != tokenizer.eod_id)


KINDS = ["bytes", "bpe", "prefix space", "windows of 65536", "windows of 256"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [64, 75])
def test_bytes_are_those_of_what_is_scored(tmp_path, kind, context):
    folder = make(tmp_path, tokenizer_of(kind, tmp_path))
    info, tokenizer = describe(str(folder)), load_tokenizer(folder)
    heldout, sizes = Shard.open(folder / "heldout"), np.load(folder / "heldout.bytes.npy")
    tokens = heldout.num_tokens // 3
    part = choose_part(info, context, tokens)
    assert 0.95 * tokens < part.tokens <= tokens and part.set_tokens == heldout.num_tokens
    cut = 0
    expected = 0
    for document, start, length in part.spans_n3.tolist():
        ids = heldout.read(document)
        end = start + length
        cut += (start > 0) + (end < len(ids))
        text = tokenizer.decode(ids)
        before, scored = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:end])
        assert text.startswith(before) and text.startswith(scored)
        assert len(text.encode()) == sizes[document]
        counted = bytes_of_ids(tokenizer, ids[start:end])
        counted -= kind == "prefix space" and start == 0
        assert counted == len(scored.encode()) - len(before.encode())
        expected += counted
    assert cut > 10 and part.num_bytes == expected
    again = choose_part(info, context, tokens)
    assert again.mark == part.mark and again.num_bytes == part.num_bytes
    whole = choose_part(info, context, 10**9)
    assert whole.num_bytes == sizes.sum() and whole.tokens == heldout.num_tokens
    assert whole.documents == whole.set_documents == len(sizes)


@pytest.mark.parametrize("character", ["a", "\u00e9", "\u6f22", "\U0001f600"])
@pytest.mark.parametrize("tokens", [4, 10, 23, 300, 1000])
def test_less_than_a_character_is_missing(tmp_path, character, tokens):
    """A stretch begins where a character does and has as many whole characters as fit."""
    texts = [f"{n}{character * 4000}" for n in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    recipe = parse_recipe(
        "name: x\nheldout_fraction: 0.5\ntokenizer: {kind: bytes}\n"
        f"inputs: [{{kind: jsonl, paths: ['{tmp_path}/texts.jsonl']}}]\n"
    )
    info = describe(str(prepare(recipe, tmp_path / "made", processes=1).folder))
    wanted = spans_of(Shard.open(info.heldout), 64, tokens)
    part, width = choose_part(info, 64, tokens), len(character.encode())
    missing = tokens - part.tokens
    assert 0 <= missing < width * len(wanted)
    document, start, length = part.spans_n3.T
    ends = (start + length == Shard.open(info.heldout).lengths[document]).sum()
    assert part.num_bytes == part.tokens - ends


def test_a_tokenizer_that_changes_text_shares_out_all_bytes(tmp_path):
    """A composed character comes back for the two of the text. So the bytes of the text that come
    back, which count, are fewer than the bytes of the decoded text."""
    from tokenizers import normalizers

    folder = make(tmp_path, hf_tokenizer(tmp_path / "hf", normalizer=normalizers.NFC()))
    info, tokenizer = describe(str(folder)), load_tokenizer(folder)
    heldout, sizes = Shard.open(folder / "heldout"), np.load(folder / "heldout.bytes.npy")
    part = choose_part(info, 64, heldout.num_tokens // 3)
    expected, more = 0, 0
    for document, start, length in part.spans_n3.tolist():
        ids = heldout.read(document)
        back = [len(tokenizer.decode(ids[:n]).encode()) for n in (start, start + length, len(ids))]
        more += back[2] - sizes[document]
        expected += sizes[document] * (back[1] - back[0]) / back[2]
    assert more > 50 and part.num_bytes == pytest.approx(expected, abs=len(part.spans_n3))


class Losing:
    """A tokenizer that gives nothing back, or a sign that stands for no character."""

    def __init__(self, text):
        self.text = text

    def decode(self, ids):
        return self.text * len(ids)


def test_text_that_does_not_come_back_at_all():
    ids = np.arange(1000)
    nothing, unknown = _Text(Losing(""), ids), _Text(Losing("\ufffd"), ids)
    for text in (nothing, unknown):
        assert text.near(500, 1) == text.near(500, -1) == 500
        assert text.near(0, 1) == 0 and text.near(1000, -1) == 1000
        assert text.share(500, 750, 4000) == 1000


def test_a_bare_prefix_knows_no_bytes(tmp_path):
    for name in ("train", "heldout"):
        with writing(tmp_path / name, np.uint16) as writer:
            writer.add(np.arange(1000) % 256)
    info = describe(str(tmp_path / "train"), str(tmp_path / "heldout"), 257, 256)
    part = choose_part(info, 64, 300)
    assert (part.tokens, part.num_bytes, part.documents) == (300, None, 1)


def test_damaged_sizes_are_named(tmp_path):
    folder = make(tmp_path, "{kind: bytes}")
    info, path = describe(str(folder)), Path(folder, "heldout.bytes.npy")
    for content in (b"junk", None):
        if content is None:
            np.save(path, np.load(Path(folder, "heldout.bytes.npy").with_name("kept.npy"))[:-1])
        else:
            path.rename(path.with_name("kept.npy"))
            path.write_bytes(content)
        with pytest.raises(UserError, match="heldout.bytes.npy is damaged; prepare the corpus"):
            choose_part(info, 64, 300)
