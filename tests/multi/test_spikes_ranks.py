"""Runs whose loss leaps: warned of, left out, or gone back from."""

import json

import pytest
from test_train import command_with_broken_steps
from tiny_corpus import rows, tiny_config

WATCH = (
    "train.tokens=12000",
    "data.global_batch_tokens=512",
    "train.spikes.window_steps=8",
    "train.spikes.deviations=30",
    "train.spikes.patience_steps=3",
    "checkpoint={save_every_steps: 5, keep_last: 9}",
    "eval.every_steps=0",
)


def leaping_command(broken, *words):
    return command_with_broken_steps(broken, *words, factor=30.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def steps_of(run):
    return [row for row in rows(run / "metrics.jsonl") if "loss" in row]


def events_of(run, kind):
    return [event for event in rows(run / "events.jsonl") if event["event"] == kind]


def optimizer_steps(run, step):
    manifest = run / "checkpoints" / f"{step:08d}" / "manifest.json"
    return json.loads(manifest.read_text())["optimizer_steps"]


@pytest.mark.parametrize("action, left_out", [("warn", 0), ("skip", 2)])
def test_leaps_are_warned_of_or_left_out(ranks, config, tmp_path, action, left_out):
    words = ("train", config, f"run_dir={tmp_path}", *WATCH)
    broken = [14, 17]
    status, said = ranks(2, leaping_command, broken, *words, f"train.spikes.action={action}")[0]
    assert status == 0, said
    assert [event["step"] for event in events_of(tmp_path, "spike")] == broken
    assert "warning: step 14: loss " in said and "leaps above" in said
    taken = steps_of(tmp_path)
    assert [row["step"] for row in taken if row["skipped"]] == broken[:left_out]
    assert optimizer_steps(tmp_path, len(taken)) == len(taken) - left_out


def test_a_leap_that_persists_goes_back_to_the_checkpoint_before_it(ranks, config, tmp_path):
    words = ("train", config, f"run_dir={tmp_path}", *WATCH, "train.spikes.action=rollback")
    status, said = ranks(2, leaping_command, [14, 15, 16], *words)[0]
    assert status == 0, said
    [event] = events_of(tmp_path, "rollback")
    assert (event["step"], event["to_step"], event["in_a_row"]) == (16, 10, 3)
    assert "are those of step 10 again, the data goes on" in said
    taken = steps_of(tmp_path)
    assert [row["step"] for row in taken] == list(range(1, len(taken) + 1))
    assert [row["step"] for row in taken if row["skipped"]] == [14, 15, 16]
    assert optimizer_steps(tmp_path, len(taken)) == 10 + len(taken) - 16


def test_a_run_stopped_among_leaps_goes_on_as_if_it_was_not(ranks, config, tmp_path):
    """What is usual, and how many leapt in a row, are part of the checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ("train", config, *WATCH, "train.spikes.action=rollback")
    assert ranks(2, leaping_command, [14, 15, 16], *words, f"run_dir={whole}")[0][0] == 0
    first = (*words, f"run_dir={parts}", "train.stop_after_steps=15")
    assert ranks(2, leaping_command, [14, 15], *first)[0][0] == 0
    second = (*words, f"run_dir={parts}", "--resume", "latest")
    assert ranks(2, leaping_command, [1], *second)[0][0] == 0
    assert [row["loss"] for row in steps_of(whole)] == [row["loss"] for row in steps_of(parts)]


def test_without_an_earlier_checkpoint_the_run_says_so(ranks, config, tmp_path):
    words = ("train", config, f"run_dir={tmp_path}", *WATCH, "train.spikes.action=rollback")
    late = "checkpoint.save_every_steps=0"
    status, said = ranks(2, leaping_command, [14, 15, 16], *words, late)[0]
    assert status == 2 and "holds no good checkpoint up to step 13; there are: none" in said
    assert "--resume STEP" in said
