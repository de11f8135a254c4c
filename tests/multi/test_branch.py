"""Runs that start from other runs: what they take over, replay, lineage."""

import json
import shutil

import numpy as np
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
    text = tiny_config(folder).read_text()
    prefix = write_tiny_corpus(folder, files=20, max_bytes=3000)
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
    from megascale.run.resolve import load_run

    config, sources, _ = load_run(run / "config.yaml")
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    batches, found = GlobalBatches(config.data, shards, config.seed), []
    cursor = Cursor()
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
    assert f"the weights of {old}/checkpoints/00000008, step 8" in said and "new" in said
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
    rows = [json.loads(line) for line in (grandchild / "metrics.jsonl").read_text().splitlines()]
    shares = [row["replayed"] for row in rows if "replayed" in row]
    assert max(shares) < 0.5 and abs(shares[-1] - 0.25) < 0.05  # what the child replayed is its own
    ((status, said),) = ranks(1, command, "lineage", old, "--among", tmp_path)
    assert status == 0
    lines = said.splitlines()
    assert lines[0] == f"{old}  <-- this one"
    assert lines[1].startswith(f"  {child}, from step 8 (") and lines[1].endswith(
        " tokens), by start.checkpoint"
    )
    assert lines[2].startswith(f"    {grandchild}, from step 8 (") and len(lines) == 3


def test_what_plan_warns_of_is_said_by_the_run(ranks, old, new, tmp_path):
    status, said = branch(ranks, old, new, tmp_path / "run", "optim.lr=0.2")
    assert status == 0
    assert "warning: the learning rate rises to 0.2, above the peak of " in said


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
        (["model.num_layers=3"], "model.num_layers = 3, but the model of"),
        (["model.moe.num_experts=4"], "model.moe.num_experts = 4, but the model of"),
        (["model.tied_embeddings=false"], "model.tied_embeddings = false, but the model of"),
        (["model.vocab_size=300"], "or: megascale grow"),
        (["data.sources.other.vocab_size=300"], "--operator resize --vocab 300 --out DIR, then"),
        (["optim.lr=-1"], "must be a finite number, at least 0"),
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
    status, said = branch(ranks, run, new, tmp_path / "alarm", "eval.forgetting_alarm=0.1")
    assert status == 2 and "cannot watch 'tiny', read from" in said and said.count("\n") == 1
    status, said = branch(ranks, run, new, tmp_path / "none")
    assert status == 0 and "warning: source 'tiny', which earlier runs have read, is not" in said


def test_a_damaged_checkpoint_of_the_parent_is_not_begun_with(ranks, old, new, tmp_path):
    """Its place in the data and its rate have been taken already."""
    parent = tmp_path / "parent"
    shutil.copytree(old, parent)
    data = next((parent / "checkpoints/00000008").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    status, said = branch(ranks, parent, new, tmp_path / "run")
    assert status == 2 and f"start from {parent}/checkpoints/00000006 instead" in said
    status, said = branch(ranks, parent / "checkpoints/00000006", new, tmp_path / "run")
    assert status == 0 and "step 6" in said, said


def test_an_unreadable_checkpoint_of_the_parent_is_passed_over(old, tmp_path):
    """And a run that has begun does not take a later one."""
    from megascale.checkpoint.load import read_manifest
    from megascale.config import dump_config
    from megascale.run.resolve import load_run

    parent, run = tmp_path / "parent", tmp_path / "run"
    shutil.copytree(old, parent)
    manifest = parent / "checkpoints/00000008/manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:99])
    words = (old.parent / "config.yaml", [f"start.checkpoint={parent}", f"run_dir={run}"])
    config = load_run(*words).config
    before = parent / "checkpoints/00000006"
    place = read_manifest(before).position.cursor["data"]["sources"]["tiny"]
    assert config.start.checkpoint == str(before)
    assert config.data.sources["tiny"].begin == place["pieces"]
    (run / "checkpoints/00000001").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    manifest.write_text(text)
    assert load_run(*words)[0] == config


def test_ranks_that_see_different_checkpoints_do_not_begin(ranks, old, new, tmp_path):
    words = (old / "checkpoints", new, f"run_dir={tmp_path / 'run'}", *QUICK)
    answers = ranks(2, branch_by_rank, *words)
    assert [status for status, _ in answers] == [2, 2], answers
    assert "was saved while the ranks began" in answers[0][1]


def branch_by_rank(checkpoints, *words):
    """A branch off another checkpoint on every rank."""
    import os

    step = 8 - 2 * int(os.environ["RANK"])
    return command("branch", checkpoints / f"{step:08}", *words)


CONSTANT = ("optim.curve=constant", "optim.warmup_tokens=2000", "optim.lr=0.004")


@pytest.fixture(scope="module")
def steady(rank_pools, tmp_path_factory):
    """A run in its constant phase."""
    folder = tmp_path_factory.mktemp("steady")
    words = (tiny_config(folder), f"run_dir={folder / 'run'}", *QUICK, *CONSTANT)
    ((status, said),) = rank_pools.run(1, command, "train", *words)
    assert status == 0, said
    return folder / "run"


def test_an_anneal_begins_at_the_rate_of_its_parent(ranks, steady, new, tmp_path):
    run, words = tmp_path / "run", ("optim.curve=anneal", "optim.lr=")
    status, said = branch(ranks, steady, new, run, *words, "train.stop_after_steps=3")
    assert status == 0 and "the learning rate begins at" not in said, said
    shutil.move(steady, tmp_path / "away")  # what has begun goes on without its parent
    status, said = branch(ranks, steady, new, run, *words, "--resume", "auto")
    shutil.move(tmp_path / "away", steady)
    assert status == 0, said
    steps = [row for row in rows(run) if "lr" in row]
    expected = [0.004 * 0.1 ** ((row["tokens_seen"] - 1) / 7999) for row in steps[:-1]]
    assert [row["lr"] for row in steps[:-1]] == pytest.approx(expected) and len(steps) == 8
    assert steps[-1]["lr"] == pytest.approx(0.0004)


def test_an_anneal_at_another_rate_is_a_warning(ranks, steady, new, tmp_path):
    words = (new, f"run_dir={tmp_path}", f"start.checkpoint={steady}", "optim.curve=anneal")
    ((status, said),) = ranks(1, command, "plan", *words, "optim.lr=0.001")
    assert status == 0 and "begins at 0.001, and that of" in said and "was 0.004 there" in said
    ((status, said),) = ranks(1, command, "plan", *words, "optim.lr=0.004")
    assert status == 0 and "the learning rate begins at" not in said
    ((status, said),) = ranks(1, command, "plan", *words[:3], "optim.lr=0.005")
    assert status == 0 and "rises to 0.005, above the peak of 0.004" in said
    ((status, said),) = ranks(1, command, "plan", *words[:3], "optim.lr=0.004")
    assert status == 0 and "rises to" not in said


def test_branches_of_one_run_become_experts(ranks, old, new, tmp_path):
    for name in ("a", "b"):
        assert branch(ranks, old, new, tmp_path / name, "train.tokens=1000")[0] == 0
    words = ("--operator", "upcycle", "--experts", "2", "--out", tmp_path / "out")
    ((status, said),) = ranks(1, command, "grow", tmp_path / "a", tmp_path / "b", *words)
    assert status == 0, said
    run = tmp_path / "apart" / "run"
    assert branch(ranks, tmp_path / "out", new, run, "train.tokens=1000")[0] == 0
    shown = {}
    for member in (old, tmp_path / "a", tmp_path / "b", tmp_path / "out", run):
        status, said = command("lineage", member, "--among", run.parent)
        assert status == 0 and said.count("<-- this one") == (
            2 if member == tmp_path / "out" else 1
        )
        shown[member] = said.replace("  <-- this one", "")
    # old finds the branches by the folder that is looked in: they are not beside it
    assert len(set(shown.values())) == 1
    lines = shown[old].splitlines()
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 2, 4, 6, 2, 4]
    assert lines[2].lstrip().startswith(f"{tmp_path / 'out'}, from step ")
    assert f", with {tmp_path / 'b'}, by megascale grow --operator upcycle" in lines[2]
    assert lines[3].lstrip().startswith(f"{run}, from step ")
    assert lines[5].endswith("; what comes from it is shown above")


def test_an_anneal_without_a_parents_rate_is_one_line(ranks, new, tmp_path):
    status, said = command("plan", new, f"run_dir={tmp_path}", "optim.curve=anneal", "optim.lr=")
    assert status == 2 and "optim.curve=anneal needs optim.lr" in said


def test_new_shares_count_from_now_on(ranks, old, new, tmp_path):
    """Were they counted from the begin of the stage, the next step would be a giant."""
    run = tmp_path / "run"
    assert branch(ranks, old, new, run, REPLAY, "train.stop_after_steps=3")[0] == 0
    words = ("--resume", "auto", "data.replay_fraction=0.5")
    status, said = branch(ranks, old, new, run, *words)
    assert status == 0 and "data.replay_fraction: 0.25 -> 0.5" in said
    steps = [row for row in rows(run) if "loss" in row]
    assert all(abs(row["num_tokens"] - 1000) <= 2 * 128 for row in steps)
    replayed = [row["replayed"] * row["tokens_seen"] for row in steps]
    assert replayed[2] == pytest.approx(0.25 * 3000, abs=128)
    assert replayed[-1] - replayed[2] == pytest.approx(0.5 * 5000, abs=2 * 128)


def tokens_of(batches, name):
    """Tokens (document, offset) of a source in batches, each once for every time it is there."""
    return [
        (document, offset)
        for batch in batches
        for source, document, start, length in batch
        if source == name
        for offset in range(start, start + length)
    ]


@pytest.mark.parametrize("change", ["data.context_tokens=64", "data.context_tokens=512", "seed=5"])
def test_another_context_or_order_repeats_nothing(ranks, old, new, tmp_path, change):
    run = tmp_path / "run"
    config = old.parent / "config.yaml"
    words = (change, "planner.capacity_tokens=512", "train.tokens=4000")
    status, said = branch(ranks, old, config, run, *words)
    assert status == 0 and "; what they left is cut and shuffled anew" in said
    both = tokens_of(batches_of(old, 8) + batches_of(run, 4), "tiny")
    assert len(set(both)) == len(both) > 11000


def test_what_a_grandparent_read_goes_on_too(ranks, old, new, tmp_path):
    child, grandchild = tmp_path / "child", tmp_path / "grandchild"
    assert branch(ranks, old, new, child)[0] == 0
    config = old.parent / "config.yaml"
    status, said = branch(ranks, child, config, grandchild, "train.tokens=4000", "seed=5")
    assert status == 0 and "source 'tiny' goes on after the" in said
    both = tokens_of(batches_of(old, 8) + batches_of(grandchild, 4), "tiny")
    assert len(set(both)) == len(both) > 11000


def test_a_source_that_a_child_leaves_alone_is_remembered(ranks, old, new, tmp_path):
    child, grandchild = tmp_path / "child", tmp_path / "grandchild"
    both = "data.stages=[{blend: {other: 1, tiny: 0}}]"
    tiny = f"data.sources.tiny={{path: {old.parent / 'train'}, vocab_size: 257, eod_id: 256}}"
    status, said = branch(ranks, old, new, child, tiny, both, "seed=5")
    assert status == 0, said
    config = old.parent / "config.yaml"
    status, said = branch(ranks, child, config, grandchild, "train.tokens=4000", "seed=5")
    assert status == 0 and "source 'tiny' goes on after the" in said
    tokens = tokens_of(batches_of(old, 8) + batches_of(grandchild, 4), "tiny")
    assert len(set(tokens)) == len(tokens) > 11000
    words = (tiny, both, "seed=5", "--resume", "auto", REPLAY, "train.tokens=12000")
    status, said = branch(ranks, old, new, child, *words)
    assert status == 0 and "of them replayed" in said, said


def test_a_branch_that_died_before_it_saved_begins_anew(ranks, old, tmp_path):
    """Its places hold for the seed and context that it had then."""
    run, config = tmp_path / "run", old.parent / "config.yaml"
    assert branch(ranks, old, config, run, "train.tokens=4000")[0] == 0
    shutil.rmtree(run / "checkpoints")
    words = ("--resume", "auto", "seed=5", "data.context_tokens=64", "train.tokens=4000")
    assert branch(ranks, old, config, run, *words)[0] == 0
    tokens = tokens_of(batches_of(old, 8) + batches_of(run, 4), "tiny")
    assert len(set(tokens)) == len(tokens) > 11000


@pytest.mark.parametrize("change", ["start.data=restart", "start.optimizer=keep"])
def test_a_run_that_has_begun_keeps_its_start(ranks, old, new, tmp_path, change):
    run = tmp_path / "run"
    assert branch(ranks, old, new, run, "train.stop_after_steps=2")[0] == 0
    status, said = branch(ranks, old, new, run, change, "--resume", "auto")
    assert status == 2 and f"{change.split('=')[0]} was" in said and said.count("\n") == 1


def test_replay_that_is_raised_on_resume_is_of_all(ranks, old, new, tmp_path):
    """Also of what the run goes on to read; and what is gone is named, as at the start."""
    child, run, config = tmp_path / "child", tmp_path / "run", old.parent / "config.yaml"
    assert branch(ranks, old, new, child)[0] == 0
    few = ("train.stop_after_steps=2", "data.context_tokens=256")
    status, said = branch(ranks, child, config, run, *few)
    assert status == 0, said
    resumed = ("data.context_tokens=256", "--resume", "auto")
    assert branch(ranks, child, config, run, REPLAY, *resumed)[0] == 0
    names = {piece[0] for batch in batches_of(run, 8) for piece in batch}
    assert names == {"tiny", "replay/tiny", "replay/other"}
    (child / "config.yaml").unlink()
    hidden = new.parent / "train.idx"
    shutil.move(hidden, tmp_path)
    try:
        status, said = branch(ranks, child, config, run, "data.replay_fraction=0.5", *resumed)
        assert status == 2 and "replay of 'other', read from" in said
    finally:
        shutil.move(tmp_path / "train.idx", hidden)


def test_a_source_goes_on_under_another_name(ranks, old, new, tmp_path):
    run, config = tmp_path / "run", tmp_path / "renamed.yaml"
    config.write_text((old.parent / "config.yaml").read_text().replace("tiny:", "python:"))
    status, said = branch(ranks, old, config, run, "train.tokens=4000")
    assert status == 0 and "source 'python' goes on after the" in said
    both = tokens_of(batches_of(old, 8), "tiny") + tokens_of(batches_of(run, 4), "python")
    assert len(set(both)) == len(both) > 11000
    evaluations = [row["eval"] for row in rows(run) if "eval" in row]
    assert all(set(one) == {"python"} for one in evaluations)


def test_a_restart_forgets_nothing_that_was_read_before(ranks, old, tmp_path):
    from megascale.run.resolve import load_run

    config, run = old.parent / "config.yaml", tmp_path / "run"
    status, said = branch(ranks, old, config, run, "start.data=restart", "train.tokens=2000")
    assert status == 0 and "source 'tiny' is read from its beginning" in said
    assert batches_of(run, 2) == batches_of(old, 2)
    words = [f"run_dir={tmp_path / 'child'}", "train.tokens=1000", REPLAY]
    sources = load_run(config, [*words, f"start.checkpoint={run}"])[0].data.sources
    before, after = (sum(map(len, batches_of(*one))) for one in ((old, 8), (run, 2)))
    replayed, tiny = sources["replay/tiny"].earlier, sources["tiny"]
    assert [one.pieces for one in replayed.reads] == [before, 0, after]
    assert tiny.begin == after and tiny.earlier.tokens == replayed.tokens > 9900


def test_epochs_count_what_earlier_runs_read(old, tmp_path):
    words = (old.parent / "config.yaml", f"run_dir={tmp_path}", f"start.checkpoint={old}")
    everything = 150_000
    status, said = command("plan", *words, f"train.tokens={everything}", "data.max_epochs=1")
    assert status == 2 and "with what earlier runs read, would be read up to 1." in said, said
    status, said = command("plan", *words, "train.tokens=8000", "data.max_epochs=1")
    assert status == 0, said


def test_replay_of_what_was_read_in_two_ways(ranks, old, new, tmp_path):
    """A source that two runs read with different contexts is replayed as both read it."""
    middle, last = tmp_path / "middle", tmp_path / "last"
    words = ("data.context_tokens=64", "train.tokens=4000")
    assert branch(ranks, old, old.parent / "config.yaml", middle, *words)[0] == 0
    status, said = branch(ranks, middle, new, last, "data.replay_fraction=0.9")
    assert status == 0, said
    read = {piece[1:] for batch in batches_of(old, 8) + batches_of(middle, 4) for piece in batch}
    again = {piece[1:] for batch in batches_of(last, 8) for piece in batch if "/" in piece[0]}
    assert again <= read and len(again) > 0.4 * len(read)


def test_the_schedule_of_a_branch_is_drawn_with_what_it_replays(steady, new, tmp_path):
    from PIL import Image

    start = (f"start.checkpoint={steady}", "optim.curve=anneal", "optim.lr=", *QUICK)
    sizes = []
    for fraction in (0, 0.25):
        out = tmp_path / f"{fraction}.png"
        words = (f"run_dir={tmp_path / 'run'}", *start, f"data.replay_fraction={fraction}")
        status, said = command("plot", "--schedule", new, *words, "--out", out)
        assert status == 0, said
        colours = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3).astype(int)
        sizes.append(int((np.abs(colours - (0xF4, 0xA5, 0x82)).max(1) < 6).sum()))
    assert sizes[0] == 0 and sizes[1] > 10_000


def test_relative_paths_of_a_parent_are_found_from_anywhere(ranks, new, tmp_path, monkeypatch):
    home = tmp_path / "home"
    config = tiny_config(home)
    config.write_text(config.read_text().replace(str(home / "train"), "train"))
    assert ranks(1, in_folder, home, "train", config, "run_dir=old", *QUICK)[0][0] == 0
    words = ("branch", "home/old", new, "run_dir=run", *QUICK, REPLAY)
    ((status, said),) = ranks(1, in_folder, tmp_path, *words)
    assert status == 0, said
    names = {piece[0] for batch in batches_of(tmp_path / "run", 8) for piece in batch}
    assert names == {"other", "replay/tiny"}


def in_folder(folder, *words):
    """The command, typed in that folder."""
    import os

    here = os.getcwd()
    os.chdir(folder)
    try:
        return command(*words)
    finally:
        os.chdir(here)


def test_replay_by_a_blend_and_by_a_fraction_must_agree(ranks, old, new, tmp_path):
    run, blend = tmp_path / "run", "data.stages=[{blend: {other: 3, replay/tiny: 1}}]"
    status, said = branch(ranks, old, new, tmp_path / "no", blend, "data.replay_fraction=0.5")
    assert status == 2 and "gives replay/tiny 0.25 of the tokens and data.replay" in said
    status, said = branch(ranks, old, new, run, blend)
    assert status == 0 and "of them replayed" in said
    assert abs(rows(run)[-2]["replayed"] - 0.25) < 0.03


def test_other_data_of_the_same_size_is_not_taken_for_the_old(ranks, old, new, tmp_path):
    folder = tmp_path / "corpus"
    config, run = tiny_config(folder), tmp_path / "old"
    assert ranks(1, command, "train", config, f"run_dir={run}", *QUICK)[0][0] == 0
    tokens = np.fromfile(folder / "train.bin", dtype=np.uint16)
    tokens[::-1].tofile(folder / "train.bin")
    status, said = branch(ranks, run, config, tmp_path / "on")
    assert status == 0 and "source 'tiny' is read from its beginning: it held" in said
    status, said = branch(ranks, run, new, tmp_path / "replay", REPLAY)
    assert status == 2 and "replay of 'tiny'" in said and "and holds" in said
    ((status, said),) = ranks(
        1, command, "train", config, f"run_dir={run}", *QUICK, "--resume", "auto"
    )
    assert status == 2 and "source 'tiny' held" in said and said.count("\n") == 1
