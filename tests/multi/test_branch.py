"""Runs that start from other runs: what they take over, replay, lineage."""

import json
import shutil

import pytest
from crash_drill import curve
from test_train import command
from tiny_corpus import tiny_config, write_tiny_corpus

QUICK = ("eval.every_steps=4", "checkpoint.save_every_steps=2", "train.tokens=8000")
REPLAY = "data.replay_fraction=0.25"


@pytest.fixture(scope="module")
def old(rank_pools, tmp_path_factory):
    """A run over a source `tiny`."""
    folder = tmp_path_factory.mktemp("old")
    config = tiny_config(folder)
    run = folder / "run"
    ((status, said),) = rank_pools.run(1, command, "train", config, f"run_dir={run}", *QUICK)
    assert status == 0, said
    return run


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """A config without a model, over another source."""
    folder = tmp_path_factory.mktemp("new")
    prefix = write_tiny_corpus(folder, files=20, max_bytes=3000)
    text = tiny_config(folder).read_text()
    text = "".join(line for line in text.splitlines(True) if not line.startswith("model:"))
    text = text.replace("tiny:", "other:").replace(str(folder / "train"), str(prefix))
    path = folder / "more.yaml"
    path.write_text(text)
    return path


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def branch(ranks, old, new, run, *words, world=1):
    answers = ranks(world, command, "branch", old, new, f"run_dir={run}", *QUICK, *words)
    assert len({status for status, _ in answers}) == 1
    return answers[0]


def batches_of(run, steps):
    """For every step of a run, (source, document, start, length) of its sequences."""
    from megascale.corpus.batches import Cursor, GlobalBatches
    from megascale.corpus.shards import Shard
    from megascale.train.describe import load_run
    from megascale.train.start import continued

    config, sources = load_run(run / "config.yaml")
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    batches, found = GlobalBatches(config.data, shards, config.seed), []
    cursor = Cursor()
    if config.start.checkpoint is not None:
        from megascale.checkpoint.load import read_manifest
        from megascale.corpus.describe import identity

        parent = read_manifest(config.start.checkpoint).position
        names = {name: identity(info) for name, info in sources.items()}
        cursor, _ = continued(parent, config, names)
    for _ in range(steps):
        batch, cursor = batches.next(cursor)
        names = [batches.names[index] for index in batch.source]
        columns = (batch.document.tolist(), batch.start.tolist(), batch.length.tolist())
        found.append(list(zip(names, *columns, strict=True)))
    return found


def test_a_quarter_of_every_batch_is_what_was_read_before(ranks, old, new, tmp_path):
    run = tmp_path / "run"
    status, said = branch(ranks, old, new, run, REPLAY)
    assert status == 0, said
    assert f"starts with the weights of {old}, step 8" in said and "new" in said
    steps = [row for row in rows(run) if "loss" in row]
    seen = {piece[1:] for batch in batches_of(old, 8) for piece in batch}
    again = 0
    for row, batch in zip(steps, batches_of(run, len(steps)), strict=True):
        replayed = [piece for piece in batch if piece[0] == "replay/tiny"]
        assert {piece[1:] for piece in replayed} <= seen and replayed
        assert sum(piece[3] for piece in batch) == row["num_tokens"]
        again += sum(piece[3] for piece in replayed)
        assert row["replayed"] == again / row["tokens_seen"]
        assert again == pytest.approx(0.25 * row["tokens_seen"], abs=128 + 32)
    assert f"{again / row['tokens_seen']:.2%} of them replayed" in said
    evaluations = [row for row in rows(run) if "eval" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    assert all(row["eval"].keys() == {"other", "replay/tiny"} for row in evaluations)


def test_what_is_new_is_not_repeated(ranks, old, new, tmp_path):
    run, words = tmp_path / "run", ("data.context_tokens=128",)
    status, said = branch(ranks, old, old.parent / "config.yaml", run, *words)
    assert status == 0 and "source 'tiny' goes on after the" in said
    before = [piece for batch in batches_of(old, 8) for piece in batch]
    after = [piece for batch in batches_of(run, 8) for piece in batch]
    both = before + after
    assert len(set(both)) == len(both) and len(after) > 50


def test_the_optimizer_and_the_schedule(ranks, old, new, tmp_path):
    lines = {}
    for how in ("keep", "reset"):
        run = tmp_path / how
        status, said = branch(ranks, old, new, run, f"start.optimizer={how}")
        assert status == 0, said
        lines[how] = [row for row in rows(run) if "loss" in row]
    assert lines["keep"][0]["loss"] == lines["reset"][0]["loss"]  # the same weights
    assert lines["keep"][2]["loss"] != lines["reset"][2]["loss"]
    first, last = lines["reset"][0], rows(old)[-2]
    assert first["lr"] > last["lr"] and first["loss"] < rows(old)[0]["loss"] - 0.3


def test_a_branch_resumes_bit_equal_without_its_parent(ranks, old, new, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(old, parent)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert branch(ranks, parent, new, whole, REPLAY, world=2)[0] == 0
    assert branch(ranks, parent, new, parts, REPLAY, "train.stop_after_steps=4", world=2)[0] == 0
    shutil.rmtree(parent)
    status, said = branch(ranks, parent, new, parts, REPLAY, "--resume", "auto", world=2)
    assert status == 0, said
    compared = ("loss", "grad_norm", "tokens_seen", "replayed", "eval")
    curves = [
        [[row.get(key) for key in compared] for row in curve(run).values()]
        for run in (whole, parts)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 9
    ((status, said),) = ranks(1, command, "lineage", parts)
    assert status == 0 and "no longer there" in said and "step 8" in said


def test_a_grandchild_replays_both(ranks, old, new, tmp_path):
    child, grandchild = tmp_path / "child", tmp_path / "grandchild"
    assert branch(ranks, old, new, child, REPLAY)[0] == 0
    third = tmp_path / "third.yaml"
    third.write_text(new.read_text().replace("other:", "third:"))
    status, said = branch(ranks, child, third, grandchild, REPLAY)
    assert status == 0, said
    names = {piece[0] for batch in batches_of(grandchild, 8) for piece in batch}
    assert names == {"third", "replay/other", "replay/tiny"}
    ((status, said),) = ranks(1, command, "lineage", old, "--among", tmp_path)
    assert status == 0
    assert said.splitlines()[1:] == [f"  to {child}", f"    to {grandchild}"]


def test_forgetting_is_told(ranks, old, new, tmp_path):
    words = ("eval.forgetting_alarm=0", "optim.lr=0.2")
    status, said = branch(ranks, old, new, tmp_path / "run", *words)
    assert status == 0
    assert "the held-out loss of 'replay/tiny' is" in said and "raise data.replay_fraction" in said
    events = [json.loads(one) for one in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [one["source"] for one in events if one["event"] == "forgetting"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.replay_fraction=1.0"], "data.replay_fraction = 1.0 must be from 0 to below 1"),
        ([REPLAY, "data.context_tokens=64"], "was read in pieces of 128 tokens; to replay it, set"),
        (["model.num_layers=3"], "tensor decoder.layers"),
        (["eval.forgetting_alarm=-1"], "eval.forgetting_alarm = -1.0 must be at least 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_branches_are_one_line(ranks, old, new, tmp_path, words, message):
    status, said = branch(ranks, old, new, tmp_path / "run", *words)
    assert status == 2 and message in said and said.count("\n") == 1


def test_bad_parents_are_one_line(ranks, old, new, tmp_path):
    for parent, message in ((tmp_path, "holds no checkpoint"), (old, "needs a run_dir of its own")):
        run = old if parent == old else tmp_path / "run"
        status, said = branch(ranks, parent, new, run, "--resume", "auto")
        assert status == 2 and message in said and said.count("\n") == 1
    ((status, said),) = ranks(1, command, "train", new, f"run_dir={tmp_path / 'run'}", REPLAY)
    assert status == 2 and "needs start.checkpoint" in said


def test_old_data_that_is_gone_is_named(ranks, new, tmp_path):
    config, run = tiny_config(tmp_path / "corpus"), tmp_path / "old"
    assert ranks(1, command, "train", config, f"run_dir={run}", *QUICK)[0][0] == 0
    (tmp_path / "corpus/train.idx").unlink()
    status, said = branch(ranks, run, new, tmp_path / "replay", REPLAY)
    assert status == 2 and "replay of 'tiny', read from" in said and said.count("\n") == 1
    status, said = branch(ranks, run, new, tmp_path / "none")
    assert status == 0 and "tiny" not in said
