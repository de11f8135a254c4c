"""`megascale data check CONFIG`: what a run reads of its sources, and what they share."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale import cli
from megascale.corpus import overlap
from megascale.corpus.check import check_source
from megascale.corpus.overlap import Part, find_overlap
from megascale.corpus.prepare import prepare_all
from megascale.corpus.recipe import parse_recipe
from megascale.corpus.shards import Shard, writing
from megascale.corpus.sources import describe
from megascale.run.blend_check import check_blend
from megascale.run.resolve import load_run, read_run
from megascale.runtime import progress

EOD = 256


def shard_of(prefix, documents, dtype=np.uint16):
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with writing(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document))
    return str(prefix)


def source_of(folder, name, train, heldout=None, **more):
    """A source of bare shards; documents get their end."""
    source = {"path": shard_of(folder / name, [[*ids, EOD] for ids in train], **more)}
    if heldout is not None:
        prefix = folder / f"{name}-heldout"
        source["heldout"] = shard_of(prefix, [[*ids, EOD] for ids in heldout], **more)
    return {**source, "vocab_size": 257, "eod_id": EOD}


def config_of(folder, sources, blend=None, tokens=600, **data):
    data |= {"sources": sources, "context_tokens": 16, "global_batch_tokens": 64}
    if blend is not None:
        data["stages"] = [{"blend": blend}]
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 2}
    path = folder / "run.yaml"
    tree = {"data": data, "model": model, "train": {"tokens": tokens}}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def shared_by_sets(parts):
    """The oracle: how many documents of each part are in each other one, and how many repeat."""
    counts = np.zeros((len(parts), len(parts)), dtype=np.int64)
    for i, one in enumerate(parts):
        one = [tuple(document) for document in one if len(document) > 1]
        for j, other in enumerate(parts):
            there = {tuple(document) for document in other}
            counts[i, j] = sum(document in there for document in one)
        counts[i, i] = len(one) - len(set(one))
    return counts


DOCUMENT = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(DOCUMENT, min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from([1, 3, 1 << 24]),
)
def test_overlap_is_that_of_sets(tmp_path_factory, parts, bucket):
    folder = tmp_path_factory.mktemp("parts")
    kinds = [np.uint16, np.int32, np.int64, np.uint8]
    shards = [Shard.open(shard_of(folder / str(i), part, kinds[i])) for i, part in enumerate(parts)]
    before, overlap.BUCKET_DOCUMENTS = overlap.BUCKET_DOCUMENTS, bucket
    try:
        found = find_overlap([Part(str(i), s, s.lengths) for i, s in enumerate(shards)])
    finally:
        overlap.BUCKET_DOCUMENTS = before
    assert found.documents_pp.tolist() == shared_by_sets(parts).tolist()
    for i, j in np.argwhere(found.documents_pp):
        first = parts[i][found.first_pp[i, j]]
        same = [k for k, document in enumerate(parts[i]) if document == first]
        assert first in parts[j] and same[0] == found.first_pp[i, j]
        assert i != j or len(same) > 1
    lengths = [{tuple(d): len(d) for d in part} for part in parts]
    for i, j in np.ndindex(found.tokens_pp.shape):
        if i != j:
            shared = [d for d in parts[i] if len(d) > 1 and tuple(d) in lengths[j]]
            assert found.tokens_pp[i, j] == sum(map(len, shared))


def test_a_second_look_reads_no_document(tmp_path, monkeypatch):
    shard = Shard.open(shard_of(tmp_path / "a", [[1, 2], [1, 2], [3, 4]]))
    part = Part("a", shard, shard.lengths)
    assert find_overlap([part]).documents_pp.tolist() == [[1]]
    monkeypatch.setattr(Shard, "read", lambda *args: pytest.fail("a document was read"))
    again = Shard.open(tmp_path / "a")
    assert find_overlap([Part("a", again, again.lengths)]).documents_pp.tolist() == [[1]]
    part = Part("a", again, np.array([2, 0, 2]))  # as of a source that reads some lengths alone
    assert find_overlap([part]).documents_pp.tolist() == [[0]]


def test_leaks_between_shards_of_two_types_of_numbers(tmp_path):
    """The ids count and not the type in which a shard stores them."""
    train = shard_of(tmp_path / "t", [[7, EOD], [8, EOD]], np.uint16)
    heldout = shard_of(tmp_path / "h", [[8, EOD]], np.int32)
    findings = check_source(describe(train, heldout, 257, EOD))
    assert any("1 held-out documents stand in train too" in fault for fault in findings.faults)


def test_long_work_says_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_S", -1.0)
    assert list(progress.announced("abcd", 4, "hashing x")) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"hashing x: {percent}%" for percent in (25, 50, 75, 100)
    ]
    assert lines[-1] == "hashing x: 100%, 0 s left"


def test_tokens_and_epochs_are_those_of_the_run(tmp_path):
    sources = {
        "web": source_of(tmp_path, "web", [[i % 7] * 15 for i in range(20)], [[1] * 9]),
        "code": source_of(tmp_path, "code", [[i] * 15 for i in range(5)], [[2] * 9]),
    }
    path = config_of(tmp_path, sources, {"web": 3, "code": 1}, tokens=640)
    text, _ = check_blend(load_run(path))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:4]}
    assert text.startswith("640 tokens of the run in 10 steps")
    assert rows["web"] == ["20", "320", "480", "75.00%", "1.50"]
    assert rows["code"] == ["5", "80", "160", "25.00%", "2.00"]


def test_what_sources_share_is_found(tmp_path, capsys):
    web = [[1, 2], [3, 4, 5], [1, 2], [6, 7], [9, 8]]
    code = [[3, 4, 5], [1, 2], [10, 10]]
    sources = {
        "web": source_of(tmp_path, "web", web, [[6, 7], [11, 12]]),
        "code": source_of(tmp_path, "code", code, [[9, 8]], dtype=np.int32),
        "only": source_of(tmp_path, "only", [[11, 12]], [[1, 2]]),
    }
    path = config_of(tmp_path, sources, {"web": 1, "code": 1, "only": 0})
    assert cli.main(["data", "check", path]) == 2
    said = capsys.readouterr().out
    faults = [line for line in said.splitlines() if line.startswith("fault:")]
    assert faults == [
        "fault: 1 of 2 held-out documents of 'web' (50.0% of their tokens) stand in train of "
        "'web' too; the first is held-out document 0",
        "fault: 1 of 1 held-out documents of 'code' (100.0% of their tokens) stand in train of "
        "'web' too; the first is held-out document 0",
        "fault: 1 of 1 held-out documents of 'only' (100.0% of their tokens) stand in train of "
        "'web' too; the first is held-out document 0",
        "fault: 1 of 1 held-out documents of 'only' (100.0% of their tokens) stand in train of "
        "'code' too; the first is held-out document 0",
    ]
    assert "note: 1 of 5 documents of 'web' repeat one before them (18.8% of its tokens)" in said
    assert (
        "note: 3 of 5 documents of 'web' (62.5% of its tokens) are in 'code' too, as 2 of its 3 "
        "(70.0%); the first is document 0 of 'web'" in said
    )
    assert "overlap: 8 documents of 2 training sets and 4 of 3 held-out sets were compared" in said
    assert "source 'only' is in no blend" in said and "verdict: 4 kind(s) of fault" in said


def test_a_good_blend_is_called_good(tmp_path, capsys):
    rows = [{"text": f"document {i}", "from": ("web", "code")[i % 2]} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "source_column": "from"}
    recipe = {"name": "x", "inputs": [one], "heldout_fraction": 0.1}
    prepare_all([(parse_recipe(json.dumps(recipe)), tmp_path / "x")], processes=1)
    sources = {name: {"path": str(tmp_path / "x" / name)} for name in ("web", "code")}
    path = config_of(tmp_path, sources)
    assert cli.main(["data", "check", path]) == 0
    said = capsys.readouterr().out
    assert "tokenizers: 2 sources, all are the same" in said
    assert "fault" not in said and "are in" not in said and said.endswith("verdict: good\n")
    assert cli.main(["data", "check", path, "train.tokens=6000000"]) == 0
    said = capsys.readouterr().out
    assert "about" in said and "beyond 4 passes, repeated text teaches much less" in said


def test_what_a_run_refuses_is_a_fault_here(tmp_path, capsys):
    sources = {
        "web": source_of(tmp_path, "web", [[1, 2]] * 3, [[3]]),
        "code": {**source_of(tmp_path, "code", [[1, 2]] * 3, [[6]]), "eod_id": 255},
    }
    path = config_of(tmp_path, sources, max_epochs=1)
    assert cli.main(["data", "check", path]) == 2
    said = capsys.readouterr().out
    assert "fault: source 'web' would be read up to" in said
    assert "fault: sources 'web' and 'code' were made by different tokenizers (end-of-do" in said
    assert "note: documents of sources of different tokenizers were not compared" in said
    assert "are in 'code' too" not in said and "repeat one before" in said
    assert "tokenizers: 1 of 2 sources differ" in said
    assert cli.main(["data", "check", path, "data.allow_different_tokenizers=true"]) == 2
    said = capsys.readouterr().out
    assert "note: sources 'web' and 'code' were made by different tokenizers" in said
    with pytest.raises(cli.UserError, match="different tokenizers"):
        load_run(path, ["data.max_epochs=null"])
    with pytest.raises(cli.UserError, match="data.max_epochs = 1"):
        load_run(path, ["data.allow_different_tokenizers=true"])
    assert read_run(path).sources.keys() == sources.keys()


def test_parts_of_one_corpus_share_nothing(tmp_path, capsys):
    documents = [[i] * (3 + i % 9) for i in range(40)]
    short = source_of(tmp_path, "a", documents, [[41] * 3])
    sources = {
        "short": {**short, "max_document_tokens": 8},
        "long": {**short, "min_document_tokens": 9},
    }
    path = config_of(tmp_path, sources)
    assert cli.main(["data", "check", path]) == 0
    said = capsys.readouterr().out
    assert "overlap: 40 documents of 2 training sets and 1 of 1 held-out sets" in said
    sources["long"]["min_document_tokens"] = 8
    assert cli.main(["data", "check", config_of(tmp_path, sources)]) == 0
    count = sum(len(document) + 1 == 8 for document in documents)
    assert f"note: {count} of" in capsys.readouterr().out


def test_arguments_that_do_not_go_together(tmp_path, capsys):
    sources = {"web": source_of(tmp_path, "web", [[1, 2]] * 3, [[3]])}
    path = config_of(tmp_path, sources)
    prefix = sources["web"]["path"]
    for words, problem in (
        ([path, "--eod-id", "3"], "--eod-id goes with a corpus, not with the config of a run"),
        ([path, "--context", "3"], "--context goes with a corpus"),
        ([prefix, "seed=3"], "seed=3: options go with the config of a run"),
        ([str(tmp_path / "none.yaml")], "none.yaml: No such file"),
        ([path, "data.no=3"], "unknown key 'data.no'"),
    ):
        assert cli.main(["data", "check", *words]) == 2
        assert problem in capsys.readouterr().err
    shard_of(tmp_path / "odd.yaml", [[1, EOD]])
    words = ["--vocab-size", "257", "--eod-id", "256"]
    assert cli.main(["data", "check", str(tmp_path / "odd.yaml"), *words]) == 0
