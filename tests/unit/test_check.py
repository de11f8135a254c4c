"""`megascale data check`: each fault is found, a good corpus is called good."""

import json
import shutil

import numpy as np
import pictures
import pytest

from megascale import cli
from megascale.corpus.check import (
    LOSSY,
    OTHER_SIZE,
    check_source,
    missing_ends,
)
from megascale.corpus.document_lengths import (
    length_histogram,
    plot_lengths,
    shares_by_length,
)
from megascale.corpus.prepare import prepare
from megascale.corpus.recipe import parse_recipe
from megascale.corpus.shards import writing
from megascale.corpus.sources import describe
from megascale.errors import UserError

EOD = 256


def _shard(prefix, documents):
    with writing(prefix, np.uint16) as writer:
        for document in documents:
            writer.add(np.array(document))
    return str(prefix)


def _findings(tmp_path, train, heldout=None):
    other = None if heldout is None else _shard(tmp_path / "h", heldout)
    return check_source(describe(_shard(tmp_path / "t", train), other, 257, EOD))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(60):
        (tmp_path / "in" / str(i)).write_text(f"text {i} caf\u00e9 \ufffd")
    recipe = parse_recipe(
        f"name: x\nheldout_fraction: 0.1\ninputs: [{{kind: files, paths: ['{tmp_path}/in/*']}}]"
    )
    return prepare(recipe, tmp_path / "corpus", processes=1).folder


def test_a_good_corpus(corpus):
    findings = check_source(describe(str(corpus)))
    assert findings.faults == [] and findings.verdict == "good"
    (one,) = (note for note in findings.notes if "of train" not in note and "train doc" in note)
    assert "U+FFFD" in one and one.endswith("train document 0")


@pytest.mark.parametrize(
    "train, fault",
    [
        ([[1, EOD], [300, EOD]], "1 documents with ids outside the vocabulary"),
        ([[1, EOD], [2, 3]], "1 documents that do not end"),
        ([[1, EOD, 2, EOD]], "1 documents with an end-of-document id inside"),
        ([[1, EOD], []], "1 empty documents"),
        ([[1, EOD], [2, EOD], [1, EOD], [1, EOD]], "2 exact duplicates within train"),
    ],
)
def test_each_fault(tmp_path, train, fault):
    findings = _findings(tmp_path, train, [[9, EOD]])
    assert [line.startswith(fault) for line in findings.faults] == [True]
    assert "train document" in findings.faults[0]


def test_documents_held_out_and_trained_on(tmp_path):
    findings = _findings(tmp_path, [[1, EOD], [2, EOD]], [[3, EOD], [2, EOD]])
    assert findings.faults == [
        "1 held-out documents stand in train too; the first is heldout document 1"
    ]


def test_what_is_only_noted(tmp_path):
    findings = _findings(tmp_path, [[1, EOD], [EOD]])
    assert findings.faults == []
    assert any("one token" in note for note in findings.notes)
    assert any("no held-out documents" in note for note in findings.notes)


def test_broken_text(corpus):
    raw = np.fromfile(corpus / "train.bin", np.uint16)
    raw[np.flatnonzero(raw == 0xC3)[0]] = ord("A")  # leaves half of an accented letter
    raw.tofile(corpus / "train.bin")
    findings = check_source(describe(str(corpus)))
    assert findings.faults == [
        "1 files changed after they were prepared; the first is train.bin",
        "1 documents that are not clean UTF-8 text; the first is train document 0",
    ]


def test_sizes_that_are_none(corpus):
    path = corpus / "heldout.bytes.npy"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match="heldout.bytes.npy: not the sizes of"):
        check_source(describe(str(corpus)))


def test_a_changed_token_that_could_be_one(corpus):
    raw = np.fromfile(corpus / "heldout.bin", np.uint16)
    raw[0] ^= 1  # another letter
    raw.tofile(corpus / "heldout.bin")
    findings = check_source(describe(str(corpus)))
    assert findings.faults == ["1 files changed after they were prepared; the first is heldout.bin"]


def _bpe_corpora(tmp_path):
    """Two corpora with a BPE each, of the same number of ids and of other merges."""
    texts = {"a": "the quick brown fox {}", "b": "jumps over the lazy dogs {}"}
    for name, text in texts.items():
        (tmp_path / f"in-{name}").mkdir()
        for i in range(40):
            (tmp_path / f"in-{name}" / f"{i}.txt").write_text(text.format(i))
        recipe = parse_recipe(
            f"name: x\nheldout_fraction: 0.2\ntokenizer: {{kind: bpe, vocab_size: 266}}\n"
            f"inputs: [{{kind: files, paths: ['{tmp_path}/in-{name}/*.txt']}}]"
        )
        prepare(recipe, tmp_path / name, processes=1)
    return tmp_path / "a", tmp_path / "b"


def test_shards_of_another_tokenizer(tmp_path):
    """No id is wrong, and corpus.json agrees; the text is another."""
    other, corpus = _bpe_corpora(tmp_path)
    assert check_source(describe(str(corpus))).faults == []
    first, second = (json.loads((one / "corpus.json").read_text()) for one in (other, corpus))
    tokenizer = "tokenizer/tokenizer.json"
    shutil.copy(other / tokenizer, corpus / tokenizer)
    second["files"][tokenizer] = first["files"][tokenizer]
    (corpus / "corpus.json").write_text(json.dumps(second))
    faults = check_source(describe(str(corpus))).faults
    number = second["heldout"]["documents"]
    assert f"{number} {OTHER_SIZE}; the first is heldout document 0" in faults


def test_a_lossy_hugging_face_tokenizer(tmp_path):
    """Normalising is that tokenizer's nature: said, and no fault."""
    from tokenizers import Tokenizer, normalizers

    corpus, _ = _bpe_corpora(tmp_path)
    backend = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))
    backend.normalizer = normalizers.Replace("quick", "q")
    backend.save(str(tmp_path / "lossy.json"))
    recipe = parse_recipe(
        f"name: x\nheldout_fraction: 0.2\n"
        f"tokenizer: {{kind: hf, path: '{tmp_path}/lossy.json', eod_token: <|endoftext|>}}\n"
        f"inputs: [{{kind: files, paths: ['{tmp_path}/in-a/*.txt']}}]"
    )
    findings = check_source(describe(str(prepare(recipe, tmp_path / "c", processes=1).folder)))
    assert findings.faults == []
    assert any(LOSSY in note for note in findings.notes)


def test_only_some_documents_are_decoded(corpus, monkeypatch):
    monkeypatch.setattr("megascale.corpus.check.DECODED_DOCUMENTS", 10)
    findings = check_source(describe(str(corpus)))
    assert findings.verdict == "good"
    assert any("documents of train were decoded" in note for note in findings.notes)


def test_histogram():
    text = length_histogram(np.array([1, 2, 3, 4, 100]), 4)
    rows = [line.split()[1:4] for line in text.splitlines()[1:-1]]
    assert rows == [
        ["1", "1", "0.9%"],
        ["2", "1", "1.8%"],
        ["4", "2", "6.4%"],
        *([str(2**power), "0", "0.0%"] for power in range(3, 7)),
        ["128", "1", "90.9%"],
    ]
    assert "90.9% of the tokens are in documents longer than 4 tokens" in text


def test_shares_of_the_picture_are_those_of_the_text():
    documents, tokens = shares_by_length(np.array([1, 2, 3, 4, 5, 100, 4000]), 4)
    assert documents.shape == tokens.shape == (2, 21)  # up to 2**20, whatever the corpus has
    expected = np.zeros((2, 21))
    expected[0, :3] = 1 / 7, 1 / 7, 2 / 7
    expected[1, [3, 7, 12]] = 1 / 7
    np.testing.assert_allclose(documents, expected)
    assert tokens[0, 2] == pytest.approx(7 / 4115)
    assert tokens[1, [3, 7, 12]] == pytest.approx([5 / 4115, 100 / 4115, 4000 / 4115])
    assert tokens.sum() == pytest.approx(1)
    halves, _ = shares_by_length(np.array([5, 7]), 6)  # one power, on both sides of the context
    assert halves[:, 3].tolist() == [0.5, 0.5]
    longest, _ = shares_by_length(np.array([2**22 + 1]), 6)
    assert longest.shape == (2, 24) and longest[1, 23] == 1


@pytest.mark.parametrize("lengths", [[1], [9, 100, 4000], list(range(1, 3000)), [2**25, 3]])
@pytest.mark.parametrize("context", [4, 4096, 2**20])
def test_nothing_is_printed_over_anything_in_the_picture(tmp_path, lengths, context):
    with pictures.drawn_figures() as drawn:
        plot_lengths(np.array(lengths), context, "my-corpus", tmp_path / "lengths.png")
    pictures.require_readable(drawn[0])
    texts = [text for text, _ in pictures.texts_of(drawn[0])]
    assert any(text.startswith("Lengths of my-corpus: ") for text in texts)


def test_command_line(corpus, tmp_path, capsys):
    assert cli.main(["data", "check", str(corpus), "--plots", str(tmp_path / "plots")]) == 0
    assert "verdict: good" in capsys.readouterr().out
    assert (tmp_path / "plots" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    for context in ("0", "-5", "x"):
        assert cli.main(["data", "check", str(corpus), "--context", context]) == 2
        assert "--context must be" in capsys.readouterr().err
    assert cli.main(["data", "check", str(corpus), "--context", "1Ki"]) == 0
    assert "longer than 1,024 tokens" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert cli.main(["data", "check", str(corpus), "--plots", str(tmp_path / "file")]) == 0
    said = capsys.readouterr().out
    assert "note: no picture" in said and "verdict: good" in said
    prefix = _shard(tmp_path / "bad", [[1, 2]])
    assert cli.main(["data", "check", prefix, "--vocab-size", "257", "--eod-id", "256"]) == 2
    assert "fault: 1 documents that do not end" in capsys.readouterr().out
    assert cli.main(["data", "check", prefix]) == 2
    assert "needs vocab_size" in capsys.readouterr().err
    assert cli.main(["data", "check", str(tmp_path / "none")]) == 2
    assert "megascale prepare data/python_stdlib.yaml" in capsys.readouterr().err


def test_documents_without_an_end_are_seen_by_their_last_tokens(tmp_path):
    """As a run does that begins; the check reads all of them."""
    good = [[1, EOD], [EOD], [EOD, 2, EOD]]
    assert missing_ends(describe(_shard(tmp_path / "good", good), None, 257, EOD)) is None
    bad = describe(_shard(tmp_path / "bad", [[1, EOD], [2, 3], [EOD, 4]]), None, 257, EOD)
    assert missing_ends(bad) == (
        "2 of 3 documents of train that were looked at do not end in the end-of-document id 256; "
        "the first is document 1"
    )
    many = [[1, EOD]] * 1000 + [[1]] * 1000
    line = missing_ends(describe(_shard(tmp_path / "many", many), None, 257, EOD))
    assert line.startswith("128 of 256 documents of train") and line.endswith("document 1000")
    heldout = _shard(tmp_path / "heldout", [[1, 2]])
    line = missing_ends(describe(str(tmp_path / "good"), heldout, 257, EOD))
    assert line.startswith("1 of 1 documents of heldout")


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_path_with_an_ending_is_told_without_it(tmp_path, ending):
    prefix = _shard(tmp_path / "web.text", [[1, EOD]])
    for words in ((f"{prefix}{ending}", None), (prefix, f"{prefix}{ending}")):
        with pytest.raises(UserError, match=f"leave out the ending {ending}: .* {prefix}$"):
            describe(*words, 257, EOD)
    with pytest.raises(UserError, match="no corpus there; make one"):
        describe(f"{tmp_path / 'none'}{ending}", None, 257, EOD)
    with pytest.raises(UserError, match=f"give a pair of its files, such as {prefix}$"):
        describe(str(tmp_path), None, 257, EOD)


def test_a_corpus_file_stands_in_its_folder(corpus):
    with pytest.raises(UserError, match=f"give the folder of the corpus, {corpus}$"):
        describe(str(corpus / "corpus.json"))
