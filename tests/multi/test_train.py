"""`megascale train` as a user runs it: layouts, resume, refusals, skips."""

import contextlib
import io
import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from crash_drill import curve
from tiny_corpus import tiny_config

TINY = ("train.tokens=6000", "eval.every_steps=3", "checkpoint.save_every_steps=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def command(*words):
    """(exit status, what it said) of `megascale` on this rank."""
    from megascale.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([str(word) for word in words])
    return status, said.getvalue()


def train(ranks, world, config, run_dir, *words):
    """Rank 0's status and words; all ranks end alike."""
    answers = ranks(world, command, "train", config, f"run_dir={run_dir}", *TINY, *words)
    assert len({status for status, _ in answers}) == 1
    return answers[0]


@pytest.fixture(scope="module")
def single(rank_pools, config, tmp_path_factory):
    """Curves of one process, dense and MoE."""
    curves = {}
    for name, words in (("dense", ()), ("moe", ("model.moe.num_experts=4",))):
        run_dir = tmp_path_factory.mktemp("single") / name
        status, said = train(rank_pools.run, 1, config, run_dir, *words)
        assert status == 0, said
        curves[name] = curve(run_dir)
    return curves


def assert_same_curve(expected, found):
    assert expected.keys() == found.keys()
    for step, row in expected.items():
        assert found[step]["tokens_seen"] == row["tokens_seen"]
        np.testing.assert_allclose(found[step]["loss"], row["loss"], rtol=1e-4)
        for source, score in row.get("eval", {}).items():
            assert found[step]["eval"][source]["tokens"] == score["tokens"]
            np.testing.assert_allclose(
                found[step]["eval"][source]["loss"], score["loss"], rtol=1e-4
            )


@pytest.mark.parametrize(
    "world, words",
    [
        (2, []),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2"]),
        (2, ["model.moe.num_experts=4", "parallel.expert=2"]),
        (3, ["checkpoint.async_save=false", "optim.distributed_optimizer=false"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_whole_runs_agree_and_resume_in_another_layout(
    ranks, single, config, tmp_path, world, words
):
    expected = single["moe" if "model.moe.num_experts=4" in words else "dense"]
    run_dir = tmp_path / "run"
    status, said = train(ranks, world, config, run_dir, *words, "train.stop_after_steps=3")
    assert status == 0, said
    model = [word for word in words if word.startswith("model.")]
    status, said = train(ranks, 2, config, run_dir, *model, "--resume", "latest")
    assert status == 0 and "resumed at step 3" in said
    assert_same_curve(expected, curve(run_dir))
    assert (run_dir / "plan.txt").read_text().startswith("run ")
    assert "num_layers: 2" in (run_dir / "config.yaml").read_text()


def test_the_saved_config_rebuilds_the_run(ranks, single, config, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(ranks, 1, config, first)[0] == 0
    ((status, said),) = ranks(1, command, "train", first / "config.yaml", f"run_dir={second}")
    assert status == 0, said
    assert curve(first)[1]["loss"] == curve(second)[1]["loss"]
    assert_same_curve(curve(first), curve(second))


def test_a_run_folder_is_entered_once(ranks, config, tmp_path):
    run_dir = tmp_path / "run"
    assert train(ranks, 1, config, run_dir, "train.stop_after_steps=2")[0] == 0
    status, said = train(ranks, 2, config, run_dir)
    assert status == 2 and "--resume auto" in said and "branch" in said
    assert said.count("\n") == 1
    lock = (run_dir / ".lock").open("a")
    import fcntl

    fcntl.flock(lock, fcntl.LOCK_EX)
    status, said = train(ranks, 1, config, run_dir, "--resume", "auto")
    assert status == 2 and "in use by another run" in said


def test_going_back_to_a_step_is_meant(ranks, config, tmp_path):
    run_dir = tmp_path / "run"
    assert train(ranks, 2, config, run_dir)[0] == 0
    latest, whole = run_dir / "checkpoints/latest", curve(run_dir)
    assert latest.read_text().strip() == "00000006"
    words = ("--resume", "4", "train.stop_after_steps=4")
    assert train(ranks, 2, config, run_dir, *words)[0] == 0
    assert latest.read_text().strip() == "00000004" and max(curve(run_dir)) == 4
    status, said = train(ranks, 2, config, run_dir, "--resume", "auto")
    assert status == 0 and "resumed at step 4" in said
    assert curve(run_dir).keys() == whole.keys()
    assert all(curve(run_dir)[s]["loss"] == whole[s]["loss"] for s in whole)


@pytest.mark.parametrize(
    "word, message",
    [
        ("seed=7", "seed was 1234"),
        ("model.hidden_size=64", "model.hidden_size was 32"),
        ("data.context_tokens=64", "data.context_tokens was 128"),
    ],
)
def test_a_resume_does_not_become_another_run(ranks, config, tmp_path, word, message):
    run_dir = tmp_path / "run"
    assert train(ranks, 1, config, run_dir, "train.stop_after_steps=2")[0] == 0
    status, said = train(ranks, 1, config, run_dir, word, "--resume", "auto")
    assert status == 2 and message in said
    status, said = train(ranks, 1, config, run_dir, "optim.lr=0.001", "--resume", "auto")
    assert status == 0 and "changed since the checkpoint: optim.lr: 0.01 -> 0.001" in said
    assert "learning rate at 2,048 tokens: " in said and "{" not in said


def test_the_balance_of_experts_may_change_on_resume(ranks, config, tmp_path):
    words = (config, tmp_path / "run", "model.moe.num_experts=4")
    assert train(ranks, 1, *words, "train.stop_after_steps=2")[0] == 0
    stronger = ("model.moe.balance_weight=0.5", "model.moe.estimate=exact")
    status, said = train(ranks, 1, *words, *stronger, "--resume", "auto")
    assert status == 0 and "changed since the checkpoint: model.moe.estimate" in said
    status, said = train(ranks, 1, *words, "model.moe.top_k=1", "--resume", "auto")
    assert status == 2 and "model.moe.top_k was 2" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["modle.num_layers=3"], "did you mean 'model'"),
        (["parallel.tensor=2"], "parallel.tensor * parallel.pipeline = 2 must divide the 1 ranks"),
        (["model.vocab_size=100"], "model.vocab_size = 100 is below the vocabulary"),
        (["data.sources.tiny.path=nowhere"], "no corpus there"),
        (["device=cuda"], "torch sees no CUDA device"),
        (["--resume", "latest"], "holds no checkpoint"),
        (["--resume", "maybe"], "give auto, latest or the number of a step"),
        (["data.max_epochs=1", "train.tokens=100M"], "data.max_epochs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(ranks, config, tmp_path, words, message):
    status, said = train(ranks, 1, config, tmp_path / "run", *words)
    assert status == 2 and message in said
    assert said.count("\n") == 1 and "Traceback" not in said


@pytest.mark.parametrize("resume", ["latest", "4"])
def test_a_run_that_is_not_there_leaves_nothing_behind(ranks, config, tmp_path, resume):
    status, said = train(ranks, 2, config, tmp_path / "runs" / "run", "--resume", resume)
    assert status == 2 and "holds no checkpoint" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ids_outside_the_vocabulary_are_named(ranks, tmp_path):
    from megascale.corpus.shards import ShardWriter

    config = tiny_config(tmp_path)
    writer = ShardWriter(tmp_path / "train", np.uint16)
    for document in range(60):
        writer.add(np.full(200, 300 if document == 7 else 5))
    writer.close()
    status, said = train(ranks, 1, config, tmp_path / "run")
    assert status == 2 and "document 7 holds token 300" in said


def test_a_signal_saves_and_says_how_to_go_on(ranks, config, tmp_path):
    run_dir = tmp_path / "run"
    answers = ranks(2, signalled_command, "train", config, f"run_dir={run_dir}")
    assert [status for status, _ in answers] == [0, 0]
    assert "--ranks 2 --resume auto" in answers[0][1]
    steps = len(curve(run_dir))
    assert 0 < steps < 30
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"{steps:08d}"


def signalled_command(*words):
    """Like `command`, with a Ctrl-C for rank 1 once there are steps."""
    metrics = Path(str(words[2]).removeprefix("run_dir=")) / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    if os.environ["RANK"] == "1":
        threading.Thread(target=interrupt, daemon=True).start()
    return command(*words)


def test_a_new_record_of_the_table_is_recorded(ranks, config, tmp_path):
    words = ["train", config, f"run_dir={tmp_path}", *TINY, "monitor.log_every_steps=1"]
    words += ["monitor.tensorboard=true", "train.stop_after_steps=3"]
    status, said, names = ranks(1, command_with_another_field, *words)[0]
    assert status == 0, said
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 3 and list(rows[0])[-1] == "sequences"
    for row in rows:
        assert f"  {row['sequences']} sequences  " in said
    assert "sequences" in names and (tmp_path / "plots" / "sequences.png").exists()


def command_with_another_field(*words):
    """Like `command`, then `megascale plot`, with a record more; and the names in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megascale.monitor import metric_fields as fields

    picture = fields.Picture("sequences", "Sequences of a batch")
    new = fields.Field(
        "sequences",
        "sequences",
        "Sequences of the global batch.",
        lambda step: step.batch.num_sequences,
        console=fields.Shown("{} sequences"),
        curve=fields.Curve(picture, style="line"),
    )
    run_dir = str(words[2]).removeprefix("run_dir=")
    with patch.object(fields, "FIELDS", (*fields.FIELDS, new)):
        status, said = command(*words)
        command("plot", run_dir)
    events = EventAccumulator(f"{run_dir}/tensorboard")
    events.Reload()
    return status, said, events.Tags()["scalars"]


@pytest.mark.parametrize("broken, status", [([2, 3], 0), ([2, 3, 4], 2)])
def test_steps_that_are_not_finite_are_skipped(ranks, config, tmp_path, broken, status):
    words = ["train", config, f"run_dir={tmp_path}", *TINY, "optim.max_skipped_steps=3"]
    answers = ranks(2, command_with_broken_steps, broken, *words)
    assert [answer[0] for answer in answers] == [status] * 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert skipped == broken
    if status == 2:
        assert "3 steps in a row up to step 4" in answers[0][1]
    else:
        assert all(math.isfinite(row["loss"]) for row in rows if row.get("skipped") is False)


def command_with_broken_steps(broken, *words, factor=math.nan):
    """Like `command`, with a loss times `factor` (not a number) in some steps of rank 1."""
    from megascale.training import step as steps

    honest, calls = steps.run_micro_batches, []

    def dishonest(learner, micro_batches, count, forward_only=False, waves=()):
        sums = honest(learner, micro_batches, count, forward_only, waves)
        calls.extend([] if forward_only else [1])
        if len(calls) in broken and not forward_only and os.environ["RANK"] == "1":
            sums[0] *= factor
        return sums

    steps.run_micro_batches = dishonest
    try:
        return command(*words)
    finally:
        steps.run_micro_batches = honest


BELOW_A_SEQUENCE = (
    "data.global_batch_tokens=40",
    "data.context_tokens=512",
    "planner.capacity_tokens=512",
    "train.tokens=9000",
    "eval.every_steps=0",
    "checkpoint.save_every_steps=5",
)
"""Steps of one sequence each, 12 times as long as the batch asks for."""


def test_a_batch_below_a_sequence_ends_with_the_step_that_reaches_the_tokens(
    ranks, config, tmp_path
):
    run_dir = tmp_path / "run"
    words = (*BELOW_A_SEQUENCE, "optim.warmup_tokens=1000", "monitor.log_every_steps=1")
    status, said = train(ranks, 1, config, run_dir, *words)
    assert status == 0, said
    rows = [row for row in curve(run_dir).values() if "loss" in row]
    seen = [row["tokens_seen"] for row in rows]
    assert seen[-2] < 9000 <= seen[-1] < 9000 + 512
    assert len(rows) < 30 and rows[-1]["lr"] == pytest.approx(1e-3)
    assert sum(row["lr"] < 1.2e-3 for row in rows) < len(rows) / 4
    plan = (run_dir / "plan.txt").read_text()
    assert f"{len(rows)} steps of 40 tokens to reach 9,000" in plan
    assert f"  takes {seen[-1]:,} tokens" in plan
    assert f" tokens 0.001 in step {len(rows) - 1}\n" in plan
    ((status, plan),) = ranks(1, command, "plan", config, *TINY, *words)
    assert f"{len(rows)} steps of 40 tokens" in plan
    shown = re.findall(r" %  step +(\d+)/(\d+)  loss", said)
    assert shown == [(str(step), str(len(rows))) for step in range(1, len(rows) + 1)]
    assert f"100.0 %  step {len(rows)}/{len(rows)}" in said
    ((status, told),) = ranks(1, command, "status", run_dir, "--json")
    told = json.loads(told)
    assert (told["state"], told["step"], told["total_steps"]) == ("done", len(rows), len(rows))


def test_stages_and_growth_follow_the_tokens_that_were_read(ranks, config, tmp_path):
    run_dir = tmp_path / "run"
    words = (*BELOW_A_SEQUENCE, "growth={at_tokens: 3000, factor: 2}")
    status, said = train(ranks, 1, config, run_dir, *words)
    assert status == 0, said
    for folder, tokens in ((tmp_path / "run-base", 3000), (run_dir, 9000)):
        seen = [row["tokens_seen"] for row in curve(folder).values() if "loss" in row]
        assert seen[-2] < tokens <= seen[-1]
    plan = (tmp_path / "run" / "plan.txt").read_text()
    assert f"takes {seen[-1]:,} tokens" in plan


def test_a_run_of_an_earlier_version_that_overran_its_tokens_is_over(ranks, config, tmp_path):
    """It is resumed as it lies there: its cursor is past the tokens, and has one field more."""
    run_dir = tmp_path / "run"
    words = (*BELOW_A_SEQUENCE, "checkpoint.async_save=false")
    assert train(ranks, 1, config, run_dir, *words)[0] == 0
    before = curve(run_dir)
    for manifest in (run_dir / "checkpoints").glob("*/manifest.json"):
        document = json.loads(manifest.read_text())
        document["position"]["cursor"]["data"]["nominal_tokens"] = 40 * len(before)
        manifest.write_text(json.dumps(document))
    few = "train.tokens=5000"
    status, said = train(ranks, 1, config, run_dir, *words, few, "--resume", "auto")
    assert status == 0 and "nothing is left to train: the checkpoint of step" in said, said
    assert "and train.tokens = 5,000" in said and curve(run_dir) == before
    more = "train.tokens=12000"
    status, said = train(ranks, 1, config, run_dir, *words, more, "--resume", "auto")
    assert status == 0 and "nothing is left" not in said
    assert max(row["tokens_seen"] for row in curve(run_dir).values()) >= 12000
    assert list(curve(run_dir)) == list(range(1, len(curve(run_dir)) + 1))


@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_below_a_sequence_resumes_to_the_bit(ranks, config, tmp_path, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(ranks, 2, config, whole, *BELOW_A_SEQUENCE)[0] == 0
    words = (*BELOW_A_SEQUENCE, f"train.stop_after_steps={stop}")
    assert train(ranks, 2, config, parts, *words)[0] == 0
    assert train(ranks, 2, config, parts, *BELOW_A_SEQUENCE, "--resume", "auto")[0] == 0
    losses = [[row["loss"] for row in curve(run).values()] for run in (whole, parts)]
    assert losses[0] == losses[1]
    status, said = ranks(1, command, "status", parts, "--json")[0]
    assert json.loads(said)["total_steps"] == len(losses[0])


def test_epochs_that_are_allowed_are_enough(ranks, config, tmp_path):
    """The largest number of tokens that the check lets pass is trained to its end."""
    words = (*BELOW_A_SEQUENCE, "data.max_epochs=1", "checkpoint.save_every_steps=0")
    from megascale.run.resolve import load_run

    sources = load_run(config, []).sources
    most = sources["tiny"].train_tokens // 40 * 40
    status, said = ranks(1, command, "plan", config, *words, f"train.tokens={most + 1}")[0]
    assert status == 2 and "would be read up to 1" in said and "max_epochs=2" in said
    run = tmp_path / "run"
    status, said = train(ranks, 1, config, run, *words, f"train.tokens={most}")
    assert status == 0, said
    assert max(row["tokens_seen"] for row in curve(run).values()) >= most
