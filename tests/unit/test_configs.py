"""The runs in `configs` can be planned as they stand, on a corpus in place of theirs."""

from pathlib import Path

import pytest
import yaml
from tiny_corpus import EOD, VOCAB, write_tiny_corpus

from megascale import cli
from megascale.checkpoint.manifest import Manifest, Position
from megascale.config import DataConfig, RunConfig, SourceConfig, dump_config, finalize
from megascale.corpus.batches import Cursor
from megascale.corpus.shards import Shard
from megascale.run.resolve import load_run
from megascale.run.step_problem import batches_of

SMALLER = {
    "extend_context": (
        "train.tokens=6M",
        "optim.warmup_tokens=1M",
        "data.stages=[{blend: {long: 0.25, short: 0.75}, tokens: 2M}, {blend: {long: 1}}]",
    )
}
"""Options of configs that would read the corpus of the test many times."""
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"), files=200, max_bytes=40000)


def write_parent(folder):
    """What a plan reads of a checkpoint: its manifest."""
    config = finalize(
        RunConfig(data=DataConfig(sources={"a": SourceConfig(path="a")})), {"a": 1}, VOCAB
    )
    folder.mkdir()
    Manifest(Position(0, 0, 1, dump_config(config), {}), 0, {}, {}, {}).write(folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_planned(corpus, tmp_path, path, capsys):
    heldout = corpus.parent / "heldout"
    source = f"{{path: {corpus}, heldout: {heldout}, vocab_size: {VOCAB}, eod_id: {EOD}}}"
    config = yaml.safe_load(path.read_text())
    given = [f"data.sources.{name}={source}" for name in config["data"]["sources"]]
    if "start" in config:
        write_parent(tmp_path / "parent")
        given.append(f"start.checkpoint={tmp_path / 'parent'}")
    words = (
        "plan",
        str(path),
        "--ranks",
        "2",
        f"run_dir={tmp_path / 'run'}",
        "data.max_epochs=",
        *given,
        *SMALLER.get(path.stem, ()),
    )
    assert cli.main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "step 0" in shown and "warning" not in shown, shown


@pytest.mark.parametrize("ranks", ["2", "4"])
def test_documents_of_mixed_lengths_are_whole(corpus, tmp_path, ranks, capsys):
    """Its ranges of lengths are kept, and only the corpus is another."""
    path = next(path for path in CONFIGS if path.stem == "mixed_lengths")
    sources = yaml.safe_load(path.read_text())["data"]["sources"]
    place = {"path": corpus, "vocab_size": VOCAB, "eod_id": EOD}
    given = [f"data.sources.{n}.{key}={value}" for n in sources for key, value in place.items()]
    words = ["plan", str(path), "--ranks", ranks, f"run_dir={tmp_path / 'run'}", *given]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert "short 75.00%, long 25.00%" in capsys.readouterr().out
    run = load_run(path, given)
    shard, (batch, _) = Shard.open(corpus), batches_of(run.config, run.sources).next(Cursor())
    for source, document, start, length in zip(
        batch.source, batch.document, batch.start, batch.length
    ):
        assert start == 0 and length == shard.lengths[document]
        assert (length <= 1024) == (source == 0) and length <= 4096
    assert set(batch.source) == {0, 1}
