"""Several corpora at once: outputs of a recipe, sources that documents name, several recipes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale import cli
from megascale.config import load_config, parse_config
from megascale.corpus import outputs, source_names
from megascale.corpus.made import fingerprint
from megascale.corpus.prepare import prepare, prepare_all
from megascale.corpus.recipe import load_recipes, parse_recipe
from megascale.corpus.shards import Shard
from megascale.corpus.source_names import folder_names
from megascale.corpus.sources import describe
from megascale.corpus.tokenizer_mark import tokenizer_mark
from megascale.corpus.tokenizers import load_tokenizer
from megascale.errors import UserError

SOURCES = ("Web", "code/py", "d\u00e9j\u00e0 vu")
FOLDERS = {"Web": "Web", "code/py": "code_py", "d\u00e9j\u00e0 vu": "d\u00e9j\u00e0_vu"}
SHARDS = ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "heldout.bytes.npy")


def recipe_of(name="x", **options):
    return parse_recipe(json.dumps({"name": name, "heldout_fraction": 0.2, **options}))


def rows_of(count=150):
    """Documents of three sources, mixed; some are empty."""
    return [
        {"text": f"text {i} " * (i % 4), "meta": {"from": SOURCES[i * i % 7 % 3]}}
        for i in range(count)
    ]


def put_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def split_of(path, column="meta.from", **options):
    one = {"kind": "jsonl", "paths": [str(path)], "source_column": column}
    return recipe_of(inputs=[one], **options)


def texts_of(folder, part="train"):
    shard, tokenizer = Shard.open(folder / part), load_tokenizer(folder)
    return [tokenizer.decode(shard.read(i)[:-1]) for i in range(shard.num_documents)]


def tree(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without_origin(folder):
    """corpus.json without what follows from the recipe, or from the size of all inputs."""
    facts = json.loads((folder / "corpus.json").read_text())
    others = ("source_fingerprint", "source", "round_trip")
    return {name: facts[name] for name in facts if name not in others}


def test_each_source_is_the_corpus_of_its_documents(tmp_path):
    """The oracle: a file for each source, and a recipe for each file."""
    rows = rows_of()
    split = split_of(put_lines(tmp_path / "all.jsonl", rows))
    (made,) = prepare_all([(split, tmp_path / "x")], processes=1)
    assert [one.folder for one in made.corpora] == [tmp_path / "x" / FOLDERS[s] for s in SOURCES]
    for source, one in zip(SOURCES, made.corpora):
        own = [row for row in rows if row["meta"]["from"] == source]
        path = put_lines(tmp_path / "own.jsonl", own)
        inputs = [{"kind": "jsonl", "paths": [path]}]
        alone = prepare(recipe_of(FOLDERS[source], inputs=inputs), tmp_path / "own", 1, force=True)
        assert one.facts["source"] == source and one.facts["heldout"]["documents"]
        assert without_origin(one.folder) == without_origin(alone.folder)
        for name in SHARDS:
            assert (one.folder / name).read_bytes() == (alone.folder / name).read_bytes()
        assert describe(str(one.folder)).train_documents == alone.facts["train"]["documents"]


def test_processes_and_open_files_do_not_change_a_byte(tmp_path, monkeypatch):
    tokenizer = {"kind": "bpe", "vocab_size": 270}
    split = split_of(put_lines(tmp_path / "all.jsonl", rows_of()), tokenizer=tokenizer)
    for name, processes, together in (("1", 1, 32), ("2", 2, 1)):
        monkeypatch.setattr(outputs, "OPEN_CORPORA", together)
        prepare_all([(split, tmp_path / name)], processes=processes)
    first = tree(tmp_path / "1")
    assert first == tree(tmp_path / "2") and "corpora.json" in first and "Web/train.bin" in first
    assert len({tokenizer_mark(tmp_path / "1" / folder) for folder in FOLDERS.values()}) == 1


@pytest.mark.parametrize("kind", ["parquet", "nested", "dictionary", "dataset"])
def test_a_column_of_tables_is_that_of_lines(tmp_path, kind):
    import datasets

    rows = rows_of()
    split = split_of(put_lines(tmp_path / "all.jsonl", rows), invalid_utf8="error")
    (lines,) = prepare_all([(split, tmp_path / "lines")], processes=1)
    source = pa.array([row["meta"]["from"] for row in rows])
    source = source.dictionary_encode() if kind == "dictionary" else source
    table = pa.table({"text": [row["text"] for row in rows], "from": source})
    column = "from"
    if kind == "nested":
        table, column = pa.Table.from_pylist(rows), "meta.from"
    if kind == "dataset":
        datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
        one = {"kind": "dataset", "name": str(tmp_path / "saved")}
    else:
        parquet.write_table(table, tmp_path / "all.parquet")
        one = {"kind": "parquet", "paths": [str(tmp_path / "all.parquet")]}
    columns = recipe_of(inputs=[{**one, "source_column": column}], invalid_utf8="error")
    (made,) = prepare_all([(columns, tmp_path / "made")], processes=1)
    assert len(made.corpora) == 3
    for first, second in zip(lines.corpora, made.corpora):
        assert without_origin(first.folder) == without_origin(second.folder)


MISSING = object()


@pytest.mark.parametrize(
    "value, problem",
    [
        (None, "holds null and no text"),
        (3, "holds int and no text"),
        (True, "holds bool and no text"),
        (["Web"], "holds list and no text"),
        ("", "'', which is no name of a source"),
        (" \t", "which is no name of a source"),
        ("a\nb", r"'a\\nb', which is no name"),
        ("\ud800", r"'\\ud800', which is no name"),
        ("long" * 99, r"'longlong.*'\.\.\., which is no name"),
        (MISSING, "nothing under 'from'; mend the line or set source_column; its keys are text"),
    ],
)
def test_a_value_that_names_no_source_is_named_by_file_and_line(tmp_path, value, problem):
    rows = [{"text": "good", "from": "Web"}, {"text": "bad", "from": value}]
    if value is MISSING:
        del rows[1]["from"]
    path = put_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=rf"a\.jsonl line 2: .*{problem}") as error:
        prepare_all([(split_of(path, "from"), tmp_path / "x")], processes=1)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_column_of_a_table_that_names_no_source(tmp_path):
    table = pa.table({"text": ["one", "two"], "from": ["Web", None], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for column, problem in (
        ("from", r"a\.parquet row 2: 'from', the source_column, holds null"),
        ("id", "column 'id' of .*a.parquet holds int64 and no text; set source_column to one"),
        ("no", "has no column 'no'; set source_column to one that holds text: text, from"),
    ):
        one = {"kind": "parquet", "paths": [str(tmp_path / "*.parquet")], "source_column": column}
        with pytest.raises(UserError, match=problem):
            prepare_all([(recipe_of(inputs=[one]), tmp_path / "x")], processes=1)


def test_a_recipe_of_several_is_no_config(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: x\noutputs: {a: {inputs: [{kind: python_stdlib}]}}\n")
    with pytest.raises(UserError, match="is the recipe of a corpus, not the config of a run"):
        load_config(path)
    assert load_recipes(str(path), [])[0].makes_several


@pytest.mark.parametrize("processes", [1, 2])
def test_a_column_with_too_many_values_is_refused(tmp_path, monkeypatch, processes):
    assert source_names.MOST_CORPORA == 256
    monkeypatch.setattr(source_names, "MOST_CORPORA", 5)
    rows = [{"text": f"text {i}", "url": f"site {i % 6}"} for i in range(300)]
    path = put_lines(tmp_path / "a.jsonl", rows)
    split = split_of(path, "url", heldout_fraction=0.0)
    with pytest.raises(UserError, match="source_column names more than 5 sources, such as"):
        prepare_all([(split, tmp_path / "x")], processes=processes)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl"]
    put_lines(tmp_path / "a.jsonl", [row for row in rows if row["url"] != "site 5"])
    (made,) = prepare_all([(split, tmp_path / "x")], processes=processes)
    assert [one.facts["train"]["documents"] for one in made.corpora] == [50] * 5


@settings(max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=60), unique=True, max_size=6))
def test_folders_of_sources_are_safe_and_differ(sources):
    sources = [source for source in sources if source.isprintable()]
    found = folder_names(sources)
    assert list(found) == sources
    assert len({name.casefold() for name in found.values()}) == len(sources)
    for name in found.values():
        assert Path(name).name == name and name[0] not in ".-" and len(os.fsencode(name)) < 128
        assert name.isprintable() and not set(name) & set('/\\ :*?"<>|')


def test_folders_of_sources_keep_plain_names():
    assert folder_names(["web", "Pile-CC", "v1.2", "a b/c", "..", "-x"]) == {
        "web": "web",
        "Pile-CC": "Pile-CC",
        "v1.2": "v1.2",
        "a b/c": "a_b_c",
        "..": "_.",
        "-x": "_x",
    }
    same = folder_names(["a/b", "a b", "web", "Web"])
    assert len({name.casefold() for name in same.values()}) == 4
    assert same["a/b"].startswith("a_b-") and same["web"].startswith("web-")
    assert folder_names(["Corpora.json"])["Corpora.json"].startswith("Corpora.json-")


def test_a_source_with_the_name_of_the_list(tmp_path):
    path = put_lines(tmp_path / "a.jsonl", [{"text": "one", "from": "corpora.json"}])
    split = split_of(path, "from", heldout_fraction=0.0)
    (made,) = prepare_all([(split, tmp_path / "x")], processes=1)
    assert texts_of(made.corpora[0].folder) == ["one"]
    (again,) = prepare_all([(split, tmp_path / "x")], processes=1)
    assert again.corpora[0].reused and again.corpora[0].facts["source"] == "corpora.json"


def test_a_source_without_text_to_train_on_is_left_out_and_named(tmp_path, capsys):
    rows = [{"text": f"text {i}", "from": "web"} for i in range(9)]
    rows += [{"text": " ", "from": "blank"}, {"text": "text 1", "from": "again"}]
    put_lines(tmp_path / "a.jsonl", rows)
    path = tmp_path / "r.yaml"
    one = {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "source_column": "from"}
    path.write_text(json.dumps({"name": "x", "inputs": [one], "heldout_fraction": 0}))
    words = ["prepare", str(path), "--out", str(tmp_path / "x"), "--processes", "1"]
    for _ in range(2):  # a set that is up to date says it too
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        assert "warning: source 'blank': no document is left to train on, of 1 read (1 em" in said
        assert "source 'again'" in said and "0 held out, 1 duplicates of others)" in said
    assert sorted(entry.name for entry in (tmp_path / "x").iterdir()) == ["corpora.json", "web"]
    put_lines(tmp_path / "a.jsonl", rows[9:10])
    assert cli.main([*words, "--force"]) == 2
    assert "source 'blank': no document is left" in capsys.readouterr().err


def test_lines_that_are_all_blank_make_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="recipe x: no document was read; give it more text"):
        prepare_all([(split_of(tmp_path / "a.jsonl"), tmp_path / "x")], processes=1)


# -------------------------------------------------------------------------------------- outputs


def several(tmp_path, **options):
    """A recipe with two outputs, of which the second repeats a text of the first."""
    (tmp_path / "in").mkdir(exist_ok=True)
    for i in range(30):
        (tmp_path / "in" / f"{i:02}.py").write_text(f"print({i})")
    put_lines(tmp_path / "in/a.jsonl", [{"text": f"text {i}"} for i in range(30)])
    put_lines(tmp_path / "in/b.jsonl", [{"text": "print(3)"}, {"text": "more"}])
    code = {"inputs": [{"kind": "files", "paths": [f"{tmp_path}/in/*.py"]}], "licence": "MIT"}
    names = [f"{tmp_path}/in/{name}.jsonl" for name in "ab"]
    web = {"inputs": [{"kind": "jsonl", "paths": [name]} for name in names]}
    return recipe_of(outputs={"code": code, "web": web}, licence="mixed", **options)


def test_outputs_are_the_corpora_of_their_inputs(tmp_path):
    recipe = several(tmp_path, deduplicate=False)
    (made,) = prepare_all([(recipe, tmp_path / "x")], processes=2)
    assert [one.folder.name for one in made.corpora] == ["code", "web"]
    assert [one.facts["licence"] for one in made.corpora] == ["MIT", "mixed"]
    for one in made.corpora:
        inputs = [vars(i) for i in recipe.outputs[one.folder.name].inputs]
        inputs = [{"kind": i["kind"], "paths": i["paths"]} for i in inputs]
        alone = recipe_of(one.folder.name, inputs=inputs, licence=one.facts["licence"])
        own = prepare(alone, tmp_path / "own", processes=1, force=True)
        assert without_origin(one.folder) == without_origin(own.folder)


def test_a_text_stays_in_the_first_output_that_has_it(tmp_path):
    (made,) = prepare_all([(several(tmp_path), tmp_path / "x")], processes=1)
    texts = [{*texts_of(c.folder), *texts_of(c.folder, "heldout")} for c in made.corpora]
    assert "print(3)" in texts[0] and not texts[0] & texts[1] and "more" in texts[1]
    assert [one.facts["skipped"]["duplicates"] for one in made.corpora] == [0, 1]


def test_a_set_is_up_to_date_or_replaced_as_a_whole(tmp_path):
    out = tmp_path / "x"
    recipe = several(tmp_path)
    (first,) = prepare_all([(recipe, out)], processes=1)
    (again,) = prepare_all([(recipe, out)], processes=1)
    assert [one.reused for one in (*first.corpora, *again.corpora)] == [False] * 2 + [True] * 2
    assert [one.facts for one in again.corpora] == [one.facts for one in first.corpora]
    backwards = replace(recipe, outputs=dict(reversed(recipe.outputs.items())))
    (other,) = prepare_all([(backwards, tmp_path / "backwards")], processes=1)
    (again,) = prepare_all([(backwards, tmp_path / "backwards")], processes=1)
    assert [one.folder.name for one in again.corpora] == ["web", "code"]
    shutil.rmtree(tmp_path / "backwards")
    whole = tree(out)
    other = replace(recipe, min_characters=5)
    with pytest.raises(UserError, match="another recipe or other inputs; replace it with --force"):
        prepare_all([(other, out)], processes=1)
    (out / "code" / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="prepare it again with --force$"):
        prepare_all([(recipe, out)], processes=1)
    prepare_all([(recipe, out)], processes=1, force=True)
    assert tree(out) == whole
    split = split_of(put_lines(tmp_path / "s.jsonl", rows_of()))
    prepare_all([(split, out)], processes=1, force=True)
    assert {path.name for path in out.iterdir()} == {"corpora.json", *FOLDERS.values()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "s.jsonl", "x"]


@pytest.mark.parametrize("place", ["notes.md", "mine/raw.txt", "code/notes.md"])
def test_files_of_the_user_in_a_set_are_never_deleted(tmp_path, place):
    recipe, out = several(tmp_path), tmp_path / "x"
    prepare_all([(recipe, out)], processes=1)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("mine")
    with pytest.raises(UserError, match="is no file of a corpus; move it away"):
        prepare_all([(recipe, out)], processes=1, force=True)
    assert (out / place).read_text() == "mine"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1, "corpora": ["../in"], "left_out": {}}']
)
def test_a_damaged_list_of_corpora_deletes_nothing(tmp_path, content):
    recipe, out = several(tmp_path), tmp_path / "x"
    prepare_all([(recipe, out)], processes=1)
    (out / "corpora.json").write_text(content)
    with pytest.raises(UserError, match=r"corpora\.json: not"):
        prepare_all([(recipe, out)], processes=1, force=True)
    assert (tmp_path / "in" / "a.jsonl").exists()


def test_a_set_is_no_source_and_its_corpora_are_named(tmp_path):
    prepare_all([(several(tmp_path), tmp_path / "x")], processes=1)
    with pytest.raises(UserError, match="a folder of 2 corpora; give one of them, such as .*code$"):
        describe(str(tmp_path / "x"))


def test_an_output_without_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="recipe x, output web: no document is left to train on"):
        prepare_all([(several(tmp_path, min_characters=8), tmp_path / "x")], processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


JSONL = "{kind: jsonl, paths: [a], source_column: s}"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("outputs: {a: {}}", r"outputs\.a\.inputs is missing"),
        ("outputs: {a: {inputs: []}}", r"outputs\.a\.inputs is empty"),
        ("outputs: {.a: {inputs: [{kind: python_stdlib}]}}", "name of a folder, without a dot"),
        ("outputs: {corpora.json: {inputs: [{kind: python_stdlib}]}}", "name of a folder"),
        ("outputs: {a/b: {inputs: [{kind: python_stdlib}]}}", "'a/b' must do as the name"),
        ("outputs: {a: {inputs: [{kind: files}]}}", r"outputs\.a\.inputs\[0\]: .*needs paths"),
        ("outputs: {a: {input: []}}", "unknown key 'outputs.a.input'; did you mean 'inputs'"),
        (f"outputs: {{a: {{inputs: [{JSONL}]}}}}", "source_column splits inputs into corpora"),
        (
            "inputs: [{kind: python_stdlib}]\noutputs: {a: {inputs: [{kind: python_stdlib}]}}",
            "inputs and outputs are both given",
        ),
        (f"inputs: [{JSONL}, {{kind: python_stdlib}}]", r"inputs\[1\] has no source_column"),
        ("inputs: [{kind: files, paths: [a], source_column: s}]", "means nothing for kind files"),
        ("", "inputs is empty"),
    ],
)
def test_bad_recipes_of_several(text, problem):
    with pytest.raises(UserError, match=problem):
        parse_recipe(f"name: x\n{text}")


def test_too_many_outputs():
    outputs_ = {f"o{i}": {"inputs": [{"kind": "python_stdlib"}]} for i in range(257)}
    with pytest.raises(UserError, match="outputs has 257 names; a recipe makes at most 256"):
        recipe_of(outputs=outputs_)


# ------------------------------------------------------------------------------ several recipes


def two_recipes(folder):
    for name in ("a", "b"):
        rows = [{"text": f"{name * 9} {i}"} for i in range(40)]
        put_lines(folder / f"{name}.jsonl", rows)
        inputs = [{"kind": "jsonl", "paths": [f"{name}.jsonl"]}]
        (folder / f"{name}.yaml").write_text(json.dumps({"name": name, "inputs": inputs}))
    return ["a.yaml", "b.yaml", "tokenizer={kind: bpe, vocab_size: 280}", "heldout_fraction=0.1"]


def test_recipes_share_a_tokenizer_of_the_text_of_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = two_recipes(tmp_path)
    assert cli.main(["prepare", *words, "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "corpora/a prepared" in said and "corpora/b prepared" in said
    folders = [tmp_path / "corpora" / name for name in "ab"]
    first, second = ((folder / "tokenizer/tokenizer.json").read_bytes() for folder in folders)
    merged = json.loads(first)["model"]["vocab"]
    assert first == second and "aaaa" in merged and "bbbb" in merged
    inputs = [{"kind": "jsonl", "paths": [f"{name}.jsonl"]} for name in "ab"]
    tokenizer = {"kind": "bpe", "vocab_size": 280}
    both = recipe_of(inputs=inputs, tokenizer=tokenizer, heldout_fraction=0.1)
    prepare(both, tmp_path / "both", processes=1)
    assert (tmp_path / "both/tokenizer/tokenizer.json").read_bytes() == first
    whole = tree(folders[1])
    for path in sorted(folders[1].rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert cli.main(["prepare", *words, "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "corpora/a is up to date" in said and "corpora/b prepared" in said
    assert tree(folders[1]) == whole
    assert cli.main(["prepare", "a.yaml", *words[2:], "--processes", "1"]) == 2
    assert "corpora/a: holds a corpus from another recipe" in capsys.readouterr().err


def test_an_error_in_one_recipe_leaves_nothing_of_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = two_recipes(tmp_path)
    (tmp_path / "b.jsonl").write_text("no JSON\n")
    before = sorted(tmp_path.iterdir())
    assert cli.main(["prepare", *words[:2], "--out", "made", "--processes", "1"]) == 2
    assert "b.jsonl line 1: not a JSON object" in capsys.readouterr().err
    assert sorted((tmp_path / "made").iterdir()) == []
    (tmp_path / "made").rmdir()
    assert sorted(tmp_path.iterdir()) == before


def test_recipes_that_do_not_go_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_recipes(tmp_path)
    assert [one.name for one in load_recipes("a.yaml", ["./b.yaml", "min_characters=2"])] == [*"ab"]
    other = (tmp_path / "b.yaml").read_text().replace('"b"', '"a"')
    (tmp_path / "c.yaml").write_text(other)
    with pytest.raises(UserError, match="recipes a.yaml and c.yaml are both named 'a'"):
        load_recipes("a.yaml", ["c.yaml"])
    tree_ = json.loads((tmp_path / "b.yaml").read_text())
    (tmp_path / "c.yaml").write_text(
        json.dumps({**tree_, "tokenizer": {"kind": "bpe", "vocab_size": 300}})
    )
    with pytest.raises(UserError, match="recipes a.yaml and c.yaml have different tokenizers"):
        load_recipes("a.yaml", ["c.yaml"])
    assert len(load_recipes("a.yaml", ["c.yaml", "tokenizer={kind: bytes}"])) == 2
    with pytest.raises(UserError, match=r"recipe min_charactrs: .*give one, e\.g\. data/"):
        load_recipes("a.yaml", ["min_charactrs"])


def test_the_config_that_is_printed_reads_the_corpora(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    put_lines(tmp_path / "a.jsonl", rows_of())
    one = {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "source_column": "meta.from"}
    path.write_text(json.dumps({"name": "x", "inputs": [one]}))
    assert cli.main(["prepare", str(path), "--out", str(tmp_path / "x"), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    text = said[said.index("data:\n") :]
    sources = parse_config(text).data.sources
    assert yaml.safe_load(text)["data"]["sources"].keys() == {*FOLDERS.values()} == sources.keys()
    assert all(describe(source.path).train_tokens for source in sources.values())


# ---------------------------------------------------------------------------- earlier versions


ONE = (
    "{name: x, heldout_fraction: 0.2, inputs: [{kind: jsonl, paths: [in.jsonl]}, "
    "{kind: files, paths: ['*.txt'], exclude: ['b*']}]}"
)
FINGERPRINT = "1f3ccfa63ab00532d67c43c8ae5e72ec1c96cfe1d3e919ea963b323bab1fef89"
ALL = (
    "{name: x, description: d, licence: l, min_characters: 2, deduplicate: false, "
    "invalid_utf8: skip, inputs: [{kind: jsonl, paths: [in.jsonl], text_column: text}], "
    "tokenizer: {kind: bpe, vocab_size: 300}}"
)
HUB = (
    "{name: x, inputs: [{kind: dataset, name: no/where, config: c, split: 'train[:5]'}], "
    "tokenizer: {kind: hf, path: no/where, bos: none}}"
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (ONE, FINGERPRINT),
        (ALL, "e3dc51d131961551c60f955a4ce1e4a5b377b3f5c7abf623504252cb566a0b58"),
        (HUB, "d2f22228c49dd5fe6596d27a1d2db63485da5ad67d3d447198cf46d67d75b48a"),
    ],
)
def test_recipes_of_one_corpus_are_those_of_before(tmp_path, monkeypatch, text, expected):
    """The fingerprints are those of the version before recipes of several corpora."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"text {i % 40} " * (i % 5)}) for i in range(60)]
    contents = {"in.jsonl": "\n".join(rows) + "\n", "a.txt": "one", "b.txt": "two", "c.txt": "\xff"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        os.utime(name, ns=(10**18, 10**18))
    assert fingerprint(parse_recipe(text)) == expected


def test_the_shards_of_one_corpus_are_those_of_before(tmp_path, monkeypatch):
    """The checksums are those of the version before recipes of several corpora."""
    monkeypatch.chdir(tmp_path)
    test_recipes_of_one_corpus_are_those_of_before(tmp_path, monkeypatch, ONE, FINGERPRINT)
    made = prepare(parse_recipe(ONE), "out", processes=1)
    assert made.facts["source_fingerprint"] == FINGERPRINT
    sums = {name: entry["sha256"][:12] for name, entry in made.facts["files"].items()}
    assert sums == {
        "heldout.bin": "de5d08781a85",
        "heldout.bytes.npy": "7c675e4cc253",
        "heldout.idx": "d09ecf510e0c",
        "train.bin": "22daf4c16ad9",
        "train.idx": "c709aee61542",
    }
    assert np.load("out/heldout.bytes.npy").dtype == np.int64
