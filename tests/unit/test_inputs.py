"""Files as users have them: compressed, marked, of differing columns, and named where they fail."""

import bz2
import datetime
import gzip
import json
import lzma
import os
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megascale.corpus.prepare import prepare
from megascale.corpus.recipe import parse_recipe
from megascale.corpus.shards import Shard
from megascale.corpus.tokenizers import load_hf, load_tokenizer
from megascale.errors import UserError

TEXTS = [f"text number {i}, caf\u00e9 {'x' * (i % 50)}" for i in range(3000)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


def prepared(tmp_path, kind, name="*", **options):
    """Facts and texts of the corpus made of the files `name` below tmp_path/in."""
    one = {"kind": kind, "paths": [str(tmp_path / "in" / name)], **options}
    text = json.dumps({"name": "x", "inputs": [one], "heldout_fraction": 0, "deduplicate": False})
    done = prepare(parse_recipe(text), tmp_path / "out", processes=1, force=True)
    shard, tokenizer = Shard.open(tmp_path / "out/train"), load_tokenizer(tmp_path / "out")
    found = [tokenizer.decode(shard.read(i)[:-1]) for i in range(shard.num_documents)]
    return done.facts, found


def put(tmp_path, name, content):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_bytes(content)


# ---------------------------------------------------------------------------------------- JSONL

HALF = LINES.index(b"\n", len(LINES) // 2) + 1
PACKED = {
    "plain": LINES,
    "gzip": gzip.compress(LINES),
    "zstd": zstd(LINES),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "gzip of two members": gzip.compress(LINES[:HALF]) + gzip.compress(LINES[HALF:]),
    "zstd of two frames": zstd(LINES[:HALF]) + zstd(LINES[HALF:]),
    "zstd after a frame to skip": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd(LINES),
    "bzip2 of two streams": bz2.compress(LINES[:HALF]) + bz2.compress(LINES[HALF:]),
}


@pytest.mark.parametrize("packing", PACKED)
def test_compressions_are_told_by_the_first_bytes(tmp_path, packing):
    put(tmp_path, "a.JSONL", PACKED[packing])
    assert prepared(tmp_path, "jsonl")[1] == TEXTS


@pytest.mark.parametrize(
    "name, packing",
    [("a.jsonl.zst", "zstd"), ("a.JSONL.GZ", "gzip"), ("a.jsonl.bz2", "bzip2"), ("a", "gzip")]
    + [("a.jsonl.gz", "zstd"), ("a.zst", "gzip")],  # the content counts
)
def test_endings_of_any_case_and_none(tmp_path, name, packing):
    put(tmp_path, name, PACKED[packing])
    assert prepared(tmp_path, "jsonl")[1] == TEXTS


@pytest.mark.parametrize("kind", ["files", "jsonl"])
@pytest.mark.parametrize("packing", ["gzip", "zstd", "bzip2", "xz"])
@pytest.mark.parametrize("damage", ["short", "scrambled"])
def test_damaged_content_is_named(tmp_path, kind, packing, damage):
    whole = PACKED[packing]
    scrambled = whole[:10] + b"\xff" * 30 + whole[40:]  # a zstd frame need not have a checksum
    cut = {"short": whole[: len(whole) // 2], "scrambled": scrambled}
    put(tmp_path, "a.jsonl", cut[damage])
    with pytest.raises(UserError, match=r"in/a\.jsonl: .*exclude"):
        prepared(tmp_path, kind)


@pytest.mark.parametrize("kind", ["files", "jsonl"])
@pytest.mark.parametrize("ending, what", [("GZ", "gzip"), ("zst", "zstd"), ("bz2", "bzip2")])
def test_an_ending_that_is_not_true_is_named(tmp_path, kind, ending, what):
    put(tmp_path, f"a.{ending}", LINES)
    with pytest.raises(UserError, match=f"a.{ending}: its content is not {what}"):
        prepared(tmp_path, kind)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_marks_line_ends_blank_lines_and_nulls(tmp_path, pack):
    lines = [b'\xef\xbb\xbf{"text": "one"}', b"", b"  \t", b'{"text": null}', b'{"text": "two"}']
    put(tmp_path, "a.jsonl", pack(b"\r\n".join(lines)))
    put(tmp_path, "b.jsonl", pack(b""))
    put(tmp_path, "c.jsonl", pack(b"\n \n\r\n\n"))
    put(tmp_path, "d.jsonl", pack(b"\xef\xbb\xbf"))
    facts, texts = prepared(tmp_path, "jsonl")
    assert texts == ["one", "two"] and facts["skipped"]["empty"] == 1


def test_a_mark_is_no_part_of_a_file_either(tmp_path):
    put(tmp_path, "a.txt", b"\xef\xbb\xbfone")
    put(tmp_path, "b.txt", zstd(b"two \xef\xbb\xbf"))
    put(tmp_path, "c.txt", b"BZh9 is no bzip2")
    assert prepared(tmp_path, "files")[1] == ["one", "two \ufeff", "BZh9 is no bzip2"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("line", [b"{", b'["a"]', b'{"other": 1}', b'{"text": 7}'])
def test_an_error_names_the_file_and_its_own_line(tmp_path, pack, line):
    put(tmp_path, "a.jsonl", pack(LINES))
    put(tmp_path, "b.jsonl", pack(b'\n{"text": "x"}\n\n' + line + b"\n"))
    with pytest.raises(UserError, match=r"in/b\.jsonl line 4: not a JSON object") as raised:
        prepared(tmp_path, "jsonl")
    assert ("array" in str(raised.value)) == (line == b'["a"]')


def test_text_that_is_no_utf8_is_named_by_file_and_line(tmp_path):
    put(tmp_path, "a.jsonl", LINES)
    put(tmp_path, "b.jsonl", b'\n{"text": "caf\xe9"}\n')
    facts, texts = prepared(tmp_path, "jsonl")
    assert texts == TEXTS
    assert facts["skipped"]["first_invalid_utf8"] == f"{tmp_path}/in/b.jsonl line 2"


def test_text_in_nested_objects(tmp_path):
    rows = [{"meta": {"text": "one"}}, {"meta.text": "two", "meta": 1}, {"meta": {"text": None}}]
    put(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    facts, texts = prepared(tmp_path, "jsonl", text_column="meta.text")
    assert texts == ["one", "two"] and facts["skipped"]["empty"] == 1


def arrow_file():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("text", pa.string())])):
        pass
    return sink.getvalue().to_pybytes()


def arrow_stream():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])):
        pass
    return sink.getvalue().to_pybytes()


def parquet_file(table=None):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": ["one"]}) if table is None else table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "content, what",
    [
        (LINES.decode().encode("utf-16"), "is UTF-16; convert"),
        (LINES.decode().encode("utf-16-be"), "is UTF-16, UTF-32 or no text; convert"),
        (LINES.decode().encode("utf-32"), "is UTF-32; convert"),
        (gzip.compress(LINES.decode().encode("utf-16")), "is UTF-16; convert"),
        (parquet_file(), "is a Parquet file; read it with kind: parquet"),
        (arrow_file(), "is an Arrow file; write it as Parquet"),
        (arrow_stream(), "is an Arrow stream; .*kind: dataset"),
        (b"PK\x03\x04 and so on", "is a ZIP archive"),
    ],
)
def test_what_holds_no_lines_is_named(tmp_path, content, what):
    put(tmp_path, "a.jsonl", content)
    with pytest.raises(UserError, match=rf"in/a\.jsonl: {what}"):
        prepared(tmp_path, "jsonl")


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet"])
def test_a_folder_where_files_are_expected(tmp_path, kind):
    put(tmp_path, "a", b"text")
    with pytest.raises(UserError, match=r"in' is a folder; name the files in it, e\.g\. .*in/\*"):
        prepared(tmp_path, kind, "")
    os.mkdir(tmp_path / "in/b")
    if kind == "files":
        assert prepared(tmp_path, kind)[1] == ["text"]


# --------------------------------------------------------------------------------------- Parquet


def test_only_the_text_column_is_read(tmp_path):
    """Other columns differ in type from file to file, and one is of a kind that nobody reads."""
    nested = [{"deep": [{"er": 1}]}, None]
    others = [
        {"id": [1, 2], "meta": nested},
        {"id": ["a", "b"], "meta": pa.nulls(2)},
        {"id": pa.nulls(2), "when": [datetime.timedelta(1), None]},
        {},
    ]
    for i, other in enumerate(others):
        table = pa.table({"text": [f"{i} one", f"{i} two"], **other})
        put(tmp_path, f"{i}.parquet", parquet_file(table))
    expected = [f"{i} {word}" for i in range(4) for word in ("one", "two")]
    assert prepared(tmp_path, "parquet")[1] == expected


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]
    + [pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_every_kind_of_text_column(tmp_path, kind):
    put(tmp_path, "a.parquet", parquet_file(pa.table({"text": pa.array(["a", None, "b"], kind)})))
    facts, texts = prepared(tmp_path, "parquet")
    assert texts == ["a", "b"] and facts["skipped"]["empty"] == 1


def test_files_row_groups_and_columns_without_rows(tmp_path):
    text = pa.table({"text": [f"{i}" for i in range(10)]})
    put(tmp_path, "a.parquet", parquet_file(text.slice(0, 0)))
    with parquet.ParquetWriter(tmp_path / "in/b.parquet", text.schema) as writer:
        for begin, end in ((0, 3), (3, 3), (3, 10), (10, 10)):
            writer.write_table(text.slice(begin, end - begin))
    put(tmp_path, "c.parquet", parquet_file(pa.table({"text": pa.nulls(4)})))
    put(tmp_path, "d.parquet", parquet_file(pa.table({"text": pa.array([], pa.null())})))
    facts, texts = prepared(tmp_path, "parquet")
    assert texts == [f"{i}" for i in range(10)] and facts["skipped"]["empty"] == 4


def test_a_text_column_in_a_nested_one(tmp_path):
    nested = pa.table({"meta": [{"text": "one", "n": 1}, None, {"text": "two", "n": None}]})
    put(tmp_path, "a.parquet", parquet_file(nested))
    put(tmp_path, "b.parquet", parquet_file(pa.table({"meta.text": ["three"]})))
    facts, texts = prepared(tmp_path, "parquet", text_column="meta.text")
    assert texts == ["one", "two", "three"] and facts["skipped"]["empty"] == 1


def test_many_rows_and_long_ones(tmp_path):
    texts = [*TEXTS, "y" * 3_000_000]
    table = pa.table({"text": texts, "id": np.arange(len(texts))})
    put(tmp_path, "a.parquet", parquet_file(table))
    assert prepared(tmp_path, "parquet")[1] == texts


@pytest.mark.parametrize(
    "content, what",
    [
        (parquet_file(pa.table({"body": ["x"]})), "has no column 'text'; .* holds text: body$"),
        (parquet_file(pa.table({"b": [{"c": "x", "n": 1}]})), "no column 'text'; .* text: b.c$"),
        (parquet_file(pa.table({"n": [1], "m": [2]})), "no column holds text; they are n, m$"),
        (
            parquet_file(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])),
            "b.parquet has 2 columns named 'text'; write the file again",
        ),
        (gzip.compress(parquet_file()), "is packed by gzip; unpack it"),
        (parquet_file(pa.table({"text": [["x"]]})), "column 'text' of .* holds list"),
        (parquet_file(pa.table({"text": [{"a": "x"}]})), "column 'text' of .* holds struct"),
        (parquet_file()[:-20], "cannot be read as parquet"),
        (b"", "cannot be read as parquet"),
        (LINES, "cannot be read as parquet"),
        (arrow_file(), "is an Arrow file"),
        (arrow_stream(), "is an Arrow stream"),
    ],
)
def test_a_parquet_file_that_will_not_do_is_named(tmp_path, content, what):
    put(tmp_path, "a.parquet", parquet_file())
    put(tmp_path, "b.parquet", content)
    with pytest.raises(UserError, match=what) as raised:
        prepared(tmp_path, "parquet")
    assert "in/b.parquet" in str(raised.value) and "\n" not in str(raised.value)


def test_a_nested_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    same = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["c", "c"])
    for column, table, what in [
        (
            "text.body",
            {"body": [{"content": "x", "n": 1}]},
            "no column 'text.body'; .*: body.content",
        ),
        ("body.text", {"body": [{"a": {"b": "x"}}]}, "no column 'body.text'; .* text: body.a.b$"),
        ("body", {"body": [{"a": "x"}], "id": ["y"]}, "holds struct.* text: body.a, id$"),
        ("s.c", {"s": same}, "has 2 columns named 'c'"),
    ]:
        put(tmp_path, "a.parquet", parquet_file(pa.table(table)))
        with pytest.raises(UserError, match=what):
            prepared(tmp_path, "parquet", text_column=column)


@pytest.mark.parametrize("kind", ["jsonl", "files"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_is_to_be_unpacked(tmp_path, kind, mode, layout):
    put(tmp_path, "a.jsonl", LINES[:HALF])
    (tmp_path / "in/a.jsonl").rename(tmp_path / "a.jsonl")
    ending = mode[1:].replace(":", ".")
    with tarfile.open(tmp_path / f"in/a.tar{ending}", mode, format=layout) as archive:
        archive.add(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=rf"in/a\.tar{ending}: is a tar archive; unpack it"):
        prepared(tmp_path, kind)


def test_lines_that_end_in_cr_alone_are_named(tmp_path):
    put(tmp_path, "a.jsonl", LINES[:HALF].replace(b"\n", b"\r"))
    with pytest.raises(UserError, match=r"a\.jsonl line 1: .*CR alone: convert them, .* tr '\\r'"):
        prepared(tmp_path, "jsonl")
    put(tmp_path, "a.jsonl", b'{"text":\r "white space"}\r\n')
    assert prepared(tmp_path, "jsonl")[1] == ["white space"]


def test_a_line_that_will_not_do_says_what_it_is(tmp_path):
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for line, what in [
        (deep, r"a\.jsonl line 2: nested deeper than .* levels; leave the line out"),
        (b'{"body": "x", "id": 1}', "a.jsonl line 2: .* set text_column; its keys are body, id$"),
        (b'[{"text": "x"}]', "a.jsonl line 2: .* a JSON array is no JSONL"),
        (b'{"text": ', "a.jsonl line 2: not a JSON object with text"),
    ]:
        put(tmp_path, "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
        with pytest.raises(UserError, match=what) as caught:
            prepared(tmp_path, "jsonl")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet"])
def test_links_that_lead_nowhere_are_named(tmp_path, kind):
    """One that is left out in silence would make a smaller corpus."""
    put(tmp_path, "a", {"parquet": parquet_file()}.get(kind, LINES[:HALF]))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "in/b").symlink_to(tmp_path / "loop")
    (tmp_path / "in/lost").symlink_to("nowhere")
    for name, what in [
        ("b", "in/b is a link that leads back to itself; mend the link or name it in exclude"),
        ("lost", "in/lost is a link to nowhere, which is not there; mend"),
        ("*", "in/b is a link"),
        ("lost/x", "in/lost is a link to nowhere"),
        ("b/*", "in/b is a link that leads back"),
    ]:
        with pytest.raises(UserError, match=what):
            prepared(tmp_path, kind, name)
    (tmp_path / "in/lost").unlink()
    (tmp_path / "in/b").unlink()
    (tmp_path / "in/b").symlink_to("a")
    once = prepared(tmp_path, kind, "a")[1]
    assert prepared(tmp_path, kind)[1] == 2 * once
    (tmp_path / "in/lost").symlink_to("nowhere")
    assert prepared(tmp_path, kind, exclude=["*lost", "*b"])[1] == once


def test_binary_that_is_no_utf8_is_named_by_file_and_row(tmp_path):
    put(tmp_path, "a.parquet", parquet_file())
    put(tmp_path, "b.parquet", parquet_file(pa.table({"text": [b"x", b"\xff"]})))
    facts, _ = prepared(tmp_path, "parquet")
    assert facts["skipped"]["first_invalid_utf8"] == f"{tmp_path}/in/b.parquet row 2"


# ------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    "content, package", [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_a_tokenizer_that_needs_a_package_says_so(tmp_path, monkeypatch, capsys, content, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"tokenizer\.model needs {package}.*pip install {package}"
    ):
        load_hf(str(tmp_path))
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_a_sentencepiece_tokenizer_is_read(tmp_path):
    pieces = pytest.importorskip("sentencepiece", reason="NOT INSTALLED: sentencepiece")
    pieces.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=200,
        model_type="bpe",
        minloglevel=9,
    )
    facts = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    tokenizer = load_hf(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (200, 2)
    assert tokenizer.decode(tokenizer.encode(TEXTS[7])) == TEXTS[7]
