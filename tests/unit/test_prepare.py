"""From text to a corpus folder, and what happens to text that is not fit."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale import cli
from megascale.corpus.facts import unigram_bits
from megascale.corpus.made import fingerprint
from megascale.corpus.prepare import _scratch, prepare
from megascale.corpus.recipe import load_recipe, parse_recipe
from megascale.corpus.shards import Shard
from megascale.corpus.sources import describe
from megascale.corpus.tokenizers import EOD_TEXT, load_tokenizer, train_bpe
from megascale.errors import UserError

ROOT = Path(__file__).parents[2]


def _recipe(kind="files", paths="", tokenizer="{kind: bytes}", heldout=0.0, **options):
    one = {"kind": kind, "paths": [str(paths)]} if paths else {"kind": kind}
    inputs = json.dumps([one | options.pop("input", {})])
    more = "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items())
    return parse_recipe(
        f"name: x\ninputs: {inputs}\ntokenizer: {tokenizer}\nheldout_fraction: {heldout}\n{more}"
    )


def _files(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "*"


def _texts(folder, part="train"):
    shard, tokenizer = Shard.open(folder / part), load_tokenizer(folder)
    documents = [shard.read(i) for i in range(shard.num_documents)]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def _tree(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_files_in_sorted_order_each_text_once(tmp_path):
    paths = _files(tmp_path / "in", {"b": "two", "a": "one", "c": "two", "d": gzip.compress(b"x")})
    (tmp_path / "in" / "d").rename(tmp_path / "in" / "d.gz")
    done = prepare(_recipe(paths=paths), tmp_path / "out", processes=1)
    assert _texts(tmp_path / "out") == ["one", "two", "x"]
    assert done.facts["skipped"]["duplicates"] == 1
    sizes = {"documents": 3, "tokens": 10, "bytes": 7, "returned_bytes": 7}
    assert done.facts["train"] == sizes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    kept = prepare(_recipe(paths=paths, deduplicate=False), tmp_path / "all", processes=1)
    assert kept.facts["train"]["documents"] == 4


def test_what_is_no_text_is_left_out_and_named(tmp_path):
    paths = _files(
        tmp_path / "in", {"a": "good", "b": b"caf\xe9", "c": "", "d": " \n\t", "e": b"\xff\xfe"}
    )
    done = prepare(_recipe(paths=paths), tmp_path / "out", processes=1)
    assert done.facts["skipped"] == {
        "empty": 2,
        "duplicates": 0,
        "invalid_utf8": 2,
        "first_invalid_utf8": str(tmp_path / "in" / "b"),
    }
    assert _texts(tmp_path / "out") == ["good"]
    with pytest.raises(UserError, match="in/b: not UTF-8"):
        prepare(_recipe(paths=paths, invalid_utf8="error"), tmp_path / "other", processes=1)
    assert not (tmp_path / "other").exists()


def test_min_characters(tmp_path):
    paths = _files(tmp_path / "in", {"a": "12345", "b": " 123 "})
    prepare(_recipe(paths=paths, min_characters=4), tmp_path / "out", processes=1)
    assert _texts(tmp_path / "out") == ["12345"]


def test_held_out_by_text_wherever_it_lies(tmp_path):
    contents = {f"{i:03}": f"text number {i}\n" for i in range(200)}
    renamed = {f"{999 - i}": text for i, text in enumerate(contents.values())}
    folders = []
    for name, files in (("a", contents), ("b", renamed)):
        paths = _files(tmp_path / f"in-{name}", files)
        prepare(_recipe(paths=paths, heldout=0.1), tmp_path / name, processes=1)
        folders.append(tmp_path / name)
    first, second = (set(_texts(folder, "heldout")) for folder in folders)
    assert first == second and 5 <= len(first) <= 40
    assert first | set(_texts(folders[0])) == set(contents.values())
    sizes = np.load(folders[0] / "heldout.bytes.npy")
    assert sizes.dtype == np.int64
    assert sizes.tolist() == [len(text) for text in _texts(folders[0], "heldout")]


def test_processes_do_not_change_a_byte(tmp_path):
    paths = _files(tmp_path / "in", {f"{i:03}": f"text {i % 150} " * (i % 7) for i in range(200)})
    recipe = _recipe(paths=paths, heldout=0.1, tokenizer="{kind: bpe, vocab_size: 270}")
    for processes in (1, 2):
        prepare(recipe, tmp_path / str(processes), processes=processes)
    assert _tree(tmp_path / "1") == _tree(tmp_path / "2")


def test_bpe_is_not_trained_on_held_out_text(tmp_path):
    contents = {f"{i:03}": f"text {i}" for i in range(100)}
    probe = prepare(
        _recipe(paths=_files(tmp_path / "in", contents), heldout=0.1), tmp_path / "p", 1
    )
    assert probe.facts["heldout"]["documents"]
    tokenizer = "{kind: bpe, vocab_size: 400}"
    prepare(_recipe(paths=tmp_path / "in/*", tokenizer=tokenizer, heldout=0.1), tmp_path / "a", 1)
    kept = {name: text for name, text in contents.items() if text in _texts(tmp_path / "p")}
    paths = _files(tmp_path / "train-only", kept)
    prepare(_recipe(paths=paths, tokenizer=tokenizer), tmp_path / "b", 1)
    first, second = ((tmp_path / name / "tokenizer/tokenizer.json").read_text() for name in "ab")
    assert first == second
    assert describe(str(tmp_path / "a")).tokenizer == str(tmp_path / "a")


def test_jsonl(tmp_path):
    rows = [{"body": "one\n"}, {"body": ""}, {"body": "two", "more": 1}, {"body": "\ud800"}]
    lines = [json.dumps(row).encode() for row in rows] + [b'{"body": "caf\xe9"}', b""]
    paths = _files(tmp_path / "in", {"a.jsonl": b"\n".join(lines)})
    recipe = _recipe("jsonl", paths, input={"text_column": "body"})
    done = prepare(recipe, tmp_path / "out", processes=1)
    assert _texts(tmp_path / "out") == ["one\n", "two"]
    assert done.facts["skipped"]["invalid_utf8"] == 2
    assert done.facts["skipped"]["first_invalid_utf8"].endswith("a.jsonl line 4")


@pytest.mark.parametrize("line", [b"{", b'"text"', b'{"other": "x"}', b'{"text": 1}', b"\xff"])
def test_jsonl_that_is_none(tmp_path, line):
    paths = _files(tmp_path / "in", {"a.jsonl": b'{"text": "x"}\n' + line})
    with pytest.raises(UserError, match=r"in/a\.jsonl line 2"):
        prepare(_recipe("jsonl", paths), tmp_path / "out", processes=1)


def test_a_line_of_10_megabytes(tmp_path):
    text = "0123456789" * 1_000_000
    paths = _files(tmp_path / "in", {"a.jsonl": json.dumps({"text": text}) + '\n{"text": "x"}\n'})
    prepare(_recipe("jsonl", paths), tmp_path / "out", processes=1)
    assert _texts(tmp_path / "out") == [text, "x"]


def test_parquet_and_datasets(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", None, "two"], "id": [1, 2, 3]})
    (tmp_path / "in").mkdir()
    rows.to_parquet(str(tmp_path / "in" / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    saved = {"name": str(tmp_path / "saved")}
    for i, recipe in enumerate(
        [
            _recipe("parquet", tmp_path / "in/*.parquet"),
            _recipe("dataset", input=saved),
            _recipe("dataset", input={"name": str(tmp_path / "in")}),
        ]
    ):
        done = prepare(recipe, tmp_path / f"out-{i}", processes=1)
        assert _texts(done.folder) == ["one", "two"]
        assert done.facts["skipped"]["empty"] == 1
    with pytest.raises(UserError, match="no column 'body'; set .* holds text: text$"):
        recipe = _recipe("parquet", tmp_path / "in/*", input={"text_column": "body"})
        prepare(recipe, tmp_path / "x", processes=1)
    (tmp_path / "in" / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        prepare(_recipe("parquet", tmp_path / "in/*"), tmp_path / "x", processes=1)


@pytest.mark.parametrize("kind", ["files", "jsonl"])
def test_damaged_gzip(tmp_path, kind):
    whole = gzip.compress(b'{"text": "abc"}\n' * 999)
    damaged = {
        "short": whole[:-9],
        "scrambled": whole[:20] + b"\xff" * 9 + whole[29:],
        "none": b"no gzip",
    }
    for name, content in damaged.items():
        paths = _files(tmp_path / name, {f"{name}.gz": content})
        with pytest.raises(UserError, match=f"{name}.gz: .*exclude"):
            prepare(_recipe(kind, paths), tmp_path / "out", processes=1)


def test_a_file_name_that_is_no_utf8(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in ((b"caf\xe9", b"good"), (b"th\xe9", b"\xff")):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(content)
    done = prepare(_recipe(paths=folder / "*"), tmp_path / "out", processes=1)
    assert _texts(tmp_path / "out") == ["good"]
    assert done.facts["skipped"]["first_invalid_utf8"] == f"{folder}/th\ufffd"


@pytest.mark.parametrize(
    "split, texts",
    [
        ("train[:2]", ["0", "1"]),
        ("train[50%:]", ["2", "3"]),
        ("train[3:]+train[:1]", ["3", "0"]),
        ("train+test", ["0", "1", "2", "3", "5"]),
    ],
)
def test_parts_of_a_dataset(tmp_path, split, texts):
    import datasets

    (tmp_path / "in").mkdir()
    for name, rows in (("train", "0123"), ("test", "5")):
        part = datasets.Dataset.from_dict({"text": list(rows)})
        part.to_parquet(str(tmp_path / "in" / f"{name}.parquet"))
    recipe = _recipe("dataset", input={"name": str(tmp_path / "in"), "split": split})
    prepare(recipe, tmp_path / "out", processes=1)
    assert _texts(tmp_path / "out") == texts


def test_splits_of_a_saved_dataset(tmp_path):
    import datasets

    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "in"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    recipe = _recipe("dataset", input={"name": str(tmp_path / "in"), "split": "test"})
    prepare(recipe, tmp_path / "out", processes=1)
    assert _texts(tmp_path / "out") == ["test"]
    for name, split, there in (("in", "test[:1]", "train, test"), ("one", "test", "train")):
        recipe = _recipe("dataset", input={"name": str(tmp_path / name), "split": split})
        with pytest.raises(UserError, match=f"no split .* to one of {there}$"):
            prepare(recipe, tmp_path / "x", processes=1)


@pytest.mark.parametrize("column, kind", [("id", "int64"), ("tags", "list"), ("good", "bool")])
def test_a_column_that_is_no_text(tmp_path, column, kind):
    import datasets

    rows = datasets.Dataset.from_dict({"id": [1], "tags": [["a"]], "good": [True]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    recipe = _recipe("parquet", tmp_path / "*.parquet", input={"text_column": column})
    with pytest.raises(UserError, match=f"column '{column}' .* holds {kind}"):
        prepare(recipe, tmp_path / "out", processes=1)


def test_two_at_once(tmp_path):
    paths = _files(tmp_path / "in", {"a": "one"})
    with _scratch(tmp_path / "out") as scratch:
        (scratch / "work of the first").touch()
        with pytest.raises(UserError, match="another prepare is making it"):
            prepare(_recipe(paths=paths), tmp_path / "out", processes=1)
        assert [path.name for path in scratch.iterdir()] == ["work of the first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    prepare(_recipe(paths=paths), tmp_path / "out", processes=1)


def test_killed_before_the_end(tmp_path):
    """Whatever a killed prepare left, there is no corpus, and the next one starts afresh."""
    _files(tmp_path / "in", {f"{i:03}": f"text {i} " * 99 for i in range(99)})
    (tmp_path / "r.yaml").write_text("name: x\ninputs: [{kind: files, paths: [in/*]}]\n")
    script = """
import os, sys
from megascale import cli
from megascale.corpus import prepare
prepare._give_name = lambda partial, out: os.kill(os.getpid(), 9)
cli.main(["prepare", "r.yaml", "--out", "out", "--processes", "1"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    prepare(_recipe(paths=tmp_path / "in/*"), tmp_path / "out", processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "r.yaml"]


def test_ctrl_c_while_others_work(tmp_path):
    """The whole process group gets the signal, as from a terminal."""
    _files(tmp_path / "in", {f"{i:03}": f"text {i}" for i in range(300)})
    (tmp_path / "r.yaml").write_text("name: x\ninputs: [{kind: files, paths: [in/*]}]\n")
    script = """
import pathlib, sys, time
from megascale import cli
from megascale.corpus.tokenizers import ByteTokenizer
def slow(self, texts):
    pathlib.Path("working").touch()
    time.sleep(600)
ByteTokenizer.encode_batch = slow
sys.exit(cli.main(["prepare", "r.yaml", "--out", "out", "--processes", "2"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while not (tmp_path / "working").exists() and process.poll() is None:
        assert time.monotonic() - began < 120
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "Interrupt" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "r.yaml", "working"]


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="nothing matches"):
        prepare(_recipe(paths=tmp_path / "*.txt"), tmp_path / "out")
    paths = _files(tmp_path / "in", {"a": "", "b": b"\xff"})
    with pytest.raises(UserError, match=r"no document is left .*of 2 read \(1 empty, 1 not UTF-8"):
        prepare(_recipe(paths=paths), tmp_path / "out", processes=1)
    with pytest.raises(UserError, match="no file is left"):
        prepare(_recipe(paths=paths, input={"exclude": ["*"]}), tmp_path / "out", processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_reused_refused_and_forced(tmp_path):
    paths = _files(tmp_path / "in", {"a": "one"})
    out = tmp_path / "out"
    first = prepare(_recipe(paths=paths), out, processes=1)
    again = prepare(_recipe(paths=paths, description="other words"), out, processes=1)
    assert (first.reused, again.reused) == (False, True)
    assert again.facts == first.facts
    _files(tmp_path / "in", {"b": "two"})
    with pytest.raises(UserError, match="--force"):
        prepare(_recipe(paths=paths), out, processes=1)
    prepare(_recipe(paths=paths), out, processes=1, force=True)
    assert _texts(out) == ["one", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("place", ["out/notes.md", "out/raw/a.txt", "out.partial/mine.txt"])
def test_files_of_the_user_are_never_deleted(tmp_path, place):
    paths, out = _files(tmp_path / "in", {"a": "one"}), tmp_path / "out"
    prepare(_recipe(paths=paths), out, processes=1)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    with pytest.raises(UserError, match="is no file of a corpus; move it away"):
        prepare(_recipe(paths=paths), out, processes=1, force=True)
    assert (tmp_path / place).read_text() == "mine" and _texts(out) == ["one"]


def test_a_corpus_that_was_checked_can_be_replaced(tmp_path):
    paths, out = _files(tmp_path / "in", {"a": "one"}), tmp_path / "out"
    prepare(_recipe(paths=paths), out, processes=1)
    assert cli.main(["data", "check", str(out)]) == 0 and (out / "plots/lengths.png").exists()
    (out / "plots/mine.png").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.png would be deleted by --force"):
        prepare(_recipe(paths=paths), out, processes=1, force=True)
    (out / "plots/mine.png").unlink()
    prepare(_recipe(paths=paths), out, processes=1, force=True)
    assert not (out / "plots").exists() and _texts(out) == ["one"]


def test_an_input_in_the_folder_that_is_replaced_is_refused(tmp_path):
    paths, out = _files(tmp_path / "in", {"a": "one"}), tmp_path / "out"
    prepare(_recipe(paths=paths), out, processes=1)
    (out / "cache").mkdir(exist_ok=True)
    (out / "cache/b").write_text("two")
    with pytest.raises(UserError, match="an input below .*out, which --force replaces"):
        prepare(_recipe(paths=str(out / "cache/b")), out, processes=1, force=True)
    assert (out / "cache/b").read_text() == "two"


@pytest.mark.parametrize("name", ["corpus.json", "train.bin", "heldout.idx"])
def test_a_damaged_corpus_is_not_up_to_date(tmp_path, name):
    """What describe says of it, prepare again, leads out of it."""
    paths, out = _files(tmp_path / "in", {"a": "one"}), tmp_path / "out"
    prepare(_recipe(paths=paths), out, processes=1)
    whole = _tree(out)
    (out / name).write_bytes((out / name).read_bytes()[:-9])
    with pytest.raises(UserError, match="prepare"):
        describe(str(out))
    with pytest.raises(UserError, match="prepare .*again with --force$"):
        prepare(_recipe(paths=paths), out, processes=1)
    prepare(_recipe(paths=paths), out, processes=1, force=True)
    assert _tree(out) == whole


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_another_tokenizer_is_another_corpus(tmp_path, name):
    paths, folder = _files(tmp_path / "in", {"a": "one"}), tmp_path / "hf"
    folder.mkdir()
    train_bpe(["one"], 257).save(folder)
    recipe = _recipe(
        paths=paths, tokenizer=f"{{kind: hf, path: {folder}, eod_token: '{EOD_TEXT}'}}"
    )
    before = fingerprint(recipe)
    with open(folder / name, "a") as file:
        file.write("\n")
    assert fingerprint(recipe) != before


def test_a_folder_of_something_else_stays(tmp_path):
    paths = _files(tmp_path / "in", {"a": "one"})
    with pytest.raises(UserError, match="is no corpus"):
        prepare(_recipe(paths=paths), tmp_path / "in", force=True)
    assert (tmp_path / "in" / "a").read_text() == "one"


def test_corpus_json_and_describe(tmp_path):
    paths = _files(tmp_path / "in", {"a": "aabb", "b": "caf\u00e9"})
    facts = prepare(_recipe(paths=paths), tmp_path / "out", processes=1).facts
    assert facts == json.loads((tmp_path / "out" / "corpus.json").read_text())
    counts = np.bincount([*b"aabb", 256, *"caf\u00e9".encode(), 256])
    assert facts["unigram_bits_per_byte"] == pytest.approx(unigram_bits(counts) / 9)
    info = describe(str(tmp_path / "out"))
    assert (info.train_tokens, info.train_documents, info.train_bytes) == (11, 2, 9)
    assert (info.vocab_size, info.eod_id, info.heldout) == (257, 256, None)
    with open(tmp_path / "out" / "train.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="changed after it was prepared"):
        describe(str(tmp_path / "out"))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": {}},
        {"files": {"train.bin": {"bytes": 6}}},
        {"unigram_bits_per_byte": "4"},
        {"unigram_bits_per_byte": float("nan")},
        {"tokenizer": {"kind": "bytes", "vocab_size": 10, "eod_id": 256}},
        {"tokenizer": {"kind": "own", "vocab_size": 257, "eod_id": 256}},
        {"train": {"documents": 1, "tokens": 99, "bytes": 3}},
        {"train": {"documents": 1, "tokens": 4, "bytes": 0}},
        {"heldout": {"documents": True, "tokens": 0, "bytes": 0}},
    ],
)
def test_a_corpus_file_that_was_changed(tmp_path, change):
    paths = _files(tmp_path / "in", {"a": "one"})
    out = prepare(_recipe(paths=paths), tmp_path / "out", processes=1).folder
    assert describe(str(out)).train_tokens == 4
    facts = json.loads((out / "corpus.json").read_text())
    (out / "corpus.json").write_text(json.dumps(facts | change))
    with pytest.raises(UserError, match="prepare"):
        describe(str(out))


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_corpus_file_is_refused_or_meant(tmp_path, data):
    out = tmp_path / "out"
    if not out.exists():
        prepare(_recipe(paths=_files(tmp_path / "in", {"a": "one"})), out, processes=1)
        shutil.copy(out / "corpus.json", tmp_path / "whole")
    raw = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    (out / "corpus.json").write_bytes(raw)
    try:
        info = describe(str(out))
    except UserError:
        return
    assert info.train_tokens == 4 and info.train_bytes > 0
    assert 0 <= info.eod_id < info.vocab_size and info.unigram_bits_per_byte >= 0


def test_what_a_prepared_folder_knows_itself(tmp_path):
    paths = _files(tmp_path / "in", {"a": "one"})
    out = str(prepare(_recipe(paths=paths), tmp_path / "out", processes=1).folder)
    assert describe(out, None, 257, 256) == describe(out)
    with pytest.raises(UserError, match="vocab_size = 300 .* 257"):
        describe(out, vocab_size=300)
    with pytest.raises(UserError, match="eod_id = 0 .* 256"):
        describe(out, eod_id=0)
    with pytest.raises(UserError, match="brings its own held-out"):
        describe(out, heldout=f"{out}/train")


def test_tokenizer_of_another_corpus(tmp_path):
    paths = _files(tmp_path / "in", {"a": "one two three four five six"})
    for name, size in (("a", 265), ("b", 270)):
        recipe = _recipe(paths=paths, tokenizer=f"{{kind: bpe, vocab_size: {size}}}")
        prepare(recipe, tmp_path / name, processes=1)
    shutil.copy(*(tmp_path / name / "tokenizer/tokenizer.json" for name in "ab"))
    with pytest.raises(UserError, match="tokenizer and shards disagree"):
        load_tokenizer(tmp_path / "b")
    with pytest.raises(UserError, match="tokenizer.json has .* changed after"):
        describe(str(tmp_path / "b"))


def test_unigram_bits():
    assert unigram_bits(np.array([2, 0, 2])) == pytest.approx(4.0)
    assert unigram_bits(np.array([5])) == 0.0


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_of_this_repository(path):
    recipe = load_recipe(path)
    assert recipe.description and recipe.licence and recipe.named_inputs


@pytest.mark.parametrize(
    "text, problem",
    [
        ("inputs: [{kind: python_stdlib}]", "name is missing"),
        ("name: x\ninputs: []", "inputs is empty"),
        ("name: a/b\ninputs: [{kind: python_stdlib}]", "name of a folder"),
        ("name: x\ninputs: [{kind: file}]", "must be one of python_stdlib, files"),
        ("name: x\ninputs: [{kind: files}]", "needs paths"),
        ("name: x\ninputs: [{kind: dataset}]", "needs name"),
        ("name: x\ninputs: [{kind: files, paths: [a], split: test}]", "means nothing"),
        ("name: x\ninputs: [{kind: files, path: [a]}]", "did you mean 'paths'"),
        ("name: x\nheldout_fraction: 1\ninputs: [{kind: python_stdlib}]", "below 1"),
        ("name: x\nmin_characters: 0\ninputs: [{kind: python_stdlib}]", "at least 1"),
        ("name: x\ninputs: [{kind: python_stdlib}]\ntokenizer: {kind: bpe}", "257 to 4194304"),
        (
            "name: x\ninputs: [{kind: python_stdlib}]\ntokenizer: {kind: bpe, vocab_size: 4G}",
            "257 to 4194304",
        ),
        ("name: x\ninputs: [{kind: python_stdlib}]\ntokenizer: {kind: hf}", "path is needed"),
        ("name: x\ninputs: [{kind: python_stdlib}]\ntokenizer: {path: a}", "means nothing"),
    ],
)
def test_bad_recipes(text, problem):
    with pytest.raises(UserError, match=problem):
        parse_recipe(text)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _files(tmp_path / "in", {"a": "one", "b": "two", "c": b"\xff"})
    (tmp_path / "r.yaml").write_text("name: mine\ninputs: [{kind: files, paths: ['in/*']}]\n")
    words = ["prepare", "r.yaml", "heldout_fraction=0", "--processes", "1"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "corpora/mine prepared" in printed and "1 not UTF-8" in printed
    assert cli.main(words) == 0
    assert "is up to date" in capsys.readouterr().out
    assert cli.main(["data", "check", "corpora/mine"]) == 0
    assert cli.main(["prepare", "r.yaml", "min_charactrs=3"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'min_characters'" in error and "Traceback" not in error


def test_the_folder_may_be_the_one_that_we_are_in(tmp_path, monkeypatch):
    paths, out = _files(tmp_path / "in", {"a": "one"}), tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    prepare(_recipe(paths=paths), ".", processes=1)
    assert _texts(out) == ["one"] and {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_no_torch(tmp_path):
    _files(tmp_path / "in", {"a": "one"})
    script = """
import sys
from megascale.corpus.prepare import prepare
from megascale.corpus.recipe import parse_recipe
recipe = parse_recipe("name: x\\nheldout_fraction: 0\\ninputs: [{kind: files, paths: [in/*]}]")
prepare(recipe, "out", 1)
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
