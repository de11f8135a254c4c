"""`megascale train` as a user runs it: layouts, resume, refusals, skips."""

import contextlib
import io
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

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
    assert status == 0 and "changed since the checkpoint: optim.schedule" in said


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
    from megascale.train import step as steps

    honest, calls = steps.run_micro_batches, []

    def dishonest(learner, micro_batches, count, forward_only=False):
        loss_sum, ran = honest(learner, micro_batches, count, forward_only)
        calls.extend([] if forward_only else [1])
        if len(calls) in broken and not forward_only and os.environ["RANK"] == "1":
            return factor * loss_sum, ran
        return loss_sum, ran

    steps.run_micro_batches = dishonest
    try:
        return command(*words)
    finally:
        steps.run_micro_batches = honest
