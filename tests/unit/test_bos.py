"""The token that begins a document: found, said, kept, and the input before the first token."""

import json

import numpy as np
import pytest
import tokenizer_files as made
import yaml

from megascale import cli
from megascale.commands.prepare import summary
from megascale.config import SourceConfig
from megascale.corpus.check import check_source
from megascale.corpus.recipe import parse_recipe
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo, describe, identity
from megascale.corpus.tokenizers import load_hf, load_tokenizer
from megascale.errors import UserError
from megascale.mesh.reader import TokenSource
from megascale.run.resolve import load_run

TEXTS = [f"the cat sat on {i} mats" for i in range(30)]


def ids_of(backend):
    return {token: backend.token_to_id(token) for token in (made.BEGIN, made.END, made.PAD)}


@pytest.mark.parametrize(
    "begin, config, bos, expected",
    [
        (made.BEGIN, {}, "auto", made.BEGIN),
        (None, {}, "auto", None),
        (None, {"bos_token": made.BEGIN}, "auto", None),
        (None, {"bos_token": made.BEGIN, "add_bos_token": True}, "auto", made.BEGIN),
        (None, {"bos_token": {"content": made.BEGIN}, "add_bos_token": True}, "auto", made.BEGIN),
        (made.BEGIN, {"bos_token": made.BEGIN, "add_bos_token": False}, "auto", made.BEGIN),
        (made.END, {}, "auto", None),  # what ends a document begins it anyway
        (made.BEGIN, {}, None, None),
        (made.BEGIN, {}, made.PAD, made.PAD),
    ],
)
def test_what_a_tokenizer_puts_before_a_text(tmp_path, begin, config, bos, expected):
    backend = made.byte_bpe(begin=begin)
    tokenizer = load_hf(made.save(backend, tmp_path, **config), bos=bos)
    assert tokenizer.bos_id == (None if expected is None else backend.token_to_id(expected))
    assert tokenizer.bos_id is None or tokenizer.bos_id in tokenizer.special_ids


def test_the_same_as_transformers_puts(tmp_path):
    from transformers import AutoTokenizer

    for kind in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
        for begin in (made.BEGIN, None):
            config = {"tokenizer_class": kind, "bos_token": made.BEGIN}
            folder = made.save(made.byte_bpe(begin=begin), tmp_path / f"{kind}{begin}", **config)
            theirs, ours = AutoTokenizer.from_pretrained(folder), load_hf(folder)
            begun = [] if ours.bos_id is None else [ours.bos_id]
            assert theirs("cat")["input_ids"] == [*begun, *ours.encode("cat")]
            assert (ours.bos_id is None) == (begin is None)


def test_of_several_the_last(tmp_path):
    from tokenizers import processors

    backend = made.byte_bpe()
    ids = ids_of(backend)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{made.PAD} {made.BEGIN} $A {made.END}", special_tokens=list(ids.items())
    )
    assert load_hf(made.save(backend, tmp_path)).bos_id == ids[made.BEGIN]


def test_a_bos_that_is_not_there(tmp_path):
    folder = made.save(made.byte_bpe(), tmp_path)
    with pytest.raises(UserError, match="no token '<x>'; set tokenizer.bos"):
        load_hf(folder, bos="<x>")
    inputs = "name: x\ninputs: [{kind: python_stdlib}]\n"
    with pytest.raises(UserError, match="tokenizer.bos means nothing for kind bytes"):
        parse_recipe(f"{inputs}tokenizer: {{bos: <s>}}")
    for none in ("none", "null"):
        given = f"tokenizer={{kind: hf, path: t, bos: {none}}}"
        assert parse_recipe(inputs, [given]).tokenizer.bos is None
    assert parse_recipe(inputs).tokenizer.bos == "auto"


def test_a_corpus_keeps_and_says_it(tmp_path):
    backend = made.byte_bpe()
    ids = ids_of(backend)
    folder = made.save(backend, tmp_path / "t")
    prepared = made.prepare_texts(tmp_path / "a", TEXTS, folder)
    facts, info = prepared.facts["tokenizer"], describe(str(prepared.folder))
    assert (facts["bos_id"], facts["bos_token"]) == (ids[made.BEGIN], made.BEGIN)
    assert (info.bos_id, info.first_id, info.eod_id) == (
        ids[made.BEGIN], ids[made.BEGIN], ids[made.END]
    )  # fmt: skip
    assert f"the model sees <s>, id {ids['<s>']} (tokenizer.bos)" in summary(prepared)
    assert load_tokenizer(prepared.folder).bos_id == ids[made.BEGIN]
    shard = Shard.open(info.train)
    assert not any(ids[made.BEGIN] in shard.read(i) for i in range(shard.num_documents))
    plain = made.prepare_texts(tmp_path / "b", TEXTS, folder, bos="none")
    other = describe(str(plain.folder))
    assert (other.bos_id, other.first_id) == (None, ids[made.END])
    assert f"sees the end-of-document id {ids['</s>']} (tokenizer.bos: none)" in summary(plain)
    assert other.content == info.content and identity(other) != identity(info)
    notes = check_source(other).notes
    assert any(f"puts id {ids['<s>']} before a text, and documents here" in note for note in notes)
    assert not any("before a text" in note for note in check_source(info).notes)
    config = tmp_path / "run.yaml"
    sources = {name: {"path": str(tmp_path / name / "corpus")} for name in "ab"}
    config.write_text(yaml.safe_dump({"data": {"sources": sources}}))
    with pytest.raises(UserError, match="'a' and 'b'.*ids before a document's first token"):
        load_run(config)


def test_it_is_the_input_before_the_first_token_alone(tmp_path):
    backend = made.byte_bpe()
    ids = ids_of(backend)
    prepared = made.prepare_texts(tmp_path, TEXTS, made.save(backend, tmp_path / "t"))
    info = describe(str(prepared.folder))
    shard = Shard.open(info.train)
    source = TokenSource("x", shard, info.first_id, info.vocab_size)
    whole, length = shard.read(3), int(shard.lengths[3])
    read = source.read(3, 0, length)
    assert read.inputs.tolist() == [ids[made.BEGIN], *whole[:-1]]
    assert np.array_equal(read.targets, whole) and whole[-1] == ids[made.END]
    part = source.read(3, 2, length - 2)  # from the middle: the token before it
    assert np.array_equal(part.inputs, whole[1:-1]) and np.array_equal(part.targets, whole[2:])


def test_a_bare_prefix_names_it(tmp_path):
    prepared = made.prepare_texts(tmp_path, TEXTS, made.save(made.byte_bpe(), tmp_path / "t"))
    prefix, known = str(prepared.folder / "train"), describe(str(prepared.folder))
    bare = SourceConfig(
        path=prefix, vocab_size=known.vocab_size, eod_id=known.eod_id, bos_id=known.bos_id
    )
    assert SourceInfo.of(bare).first_id == known.bos_id
    assert describe(prefix, None, known.vocab_size, known.eod_id).first_id == known.eod_id
    with pytest.raises(UserError, match="bos_id = 9999 is outside vocab_size"):
        describe(prefix, None, known.vocab_size, known.eod_id, 9999)
    with pytest.raises(UserError, match="bos_id = 5 is said of a corpus prepared with"):
        describe(str(prepared.folder), bos_id=5)
    words = ["--vocab-size", str(known.vocab_size), "--eod-id", str(known.eod_id)]
    assert cli.main(["data", "check", prefix, *words, "--bos-id", str(known.bos_id)]) == 0


def test_a_corpus_of_before_keeps_its_beginning(tmp_path):
    folder = made.save(made.byte_bpe(), tmp_path / "t")
    prepared = made.prepare_texts(tmp_path, TEXTS, folder)
    path = prepared.folder / "corpus.json"
    facts = json.loads(path.read_text())
    for name in ("bos_id", "bos_token", "special_ids"):
        del facts["tokenizer"][name]
    path.write_text(json.dumps(facts | {"source_fingerprint": "of an earlier version"}))
    info = describe(str(prepared.folder))
    assert info.bos_id is None and info.first_id == info.eod_id
    assert identity(info).startswith(f"{info.train_documents} documents of {info.train_tokens} tok")
    assert "after token" not in identity(info)
    with pytest.raises(UserError, match="an earlier version made this corpus.*--force"):
        made.prepare_texts(tmp_path, TEXTS, folder)
