"""Runs whose loss leaps: warned of, left out, or gone back from."""

import json
import math

import numpy as np
import pytest
from test_train import command_with_broken_steps
from tiny_corpus import EOD, VOCAB, rows, tiny_config

from megascale.corpus.shards import ShardWriter

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
    return broken_command(broken, 30.0, *words)


def broken_command(broken, factor, *words):
    return command_with_broken_steps(broken, *words, factor=factor)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def steps_of(run):
    return [row for row in rows(run / "metrics.jsonl") if "loss" in row]


def events_of(run, kind):
    return [event for event in rows(run / "events.jsonl") if event["event"] == kind]


def places(rollback):
    return rollback["step"], rollback["to_step"]


def manifest(run, step):
    return json.loads((run / "checkpoints" / f"{step:08d}" / "manifest.json").read_text())


def optimizer_steps(run, step):
    return manifest(run, step)["optimizer_steps"]


def sums(run, step):
    """The sums of the files of a checkpoint, which are those of its tensors."""
    return manifest(run, step)["files"]


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


@pytest.mark.parametrize("factor", [30.0, math.nan])
def test_losses_that_stay_bad_go_back_further_and_then_stop(ranks, config, tmp_path, factor):
    words = ("train", config, f"run_dir={tmp_path}", *WATCH, "train.spikes.action=rollback")
    answers = ranks(2, broken_command, range(14, 99), factor, *words)
    assert [status for status, _ in answers] == [2, 2]
    said = answers[0][1]
    assert [places(event) for event in events_of(tmp_path, "rollback")] == [(16, 10), (19, 5)]
    assert "too high, also after going back to step 5, for 3 steps up to step 22" in said
    assert "holds no good checkpoint up to step 4; there are: 5, 10" in said
    assert [row["step"] for row in steps_of(tmp_path) if row["skipped"]] == list(range(14, 23))


def test_a_rollback_that_helps_late_is_the_same_run_when_it_is_stopped(ranks, config, tmp_path):
    """Between the bursts, in the middle of one, and while it is not known whether it helped."""
    whole, broken = tmp_path / "whole", range(14, 20)
    words = ("train", config, *WATCH, "train.spikes.action=rollback")
    status, said = ranks(2, leaping_command, broken, *words, f"run_dir={whole}")[0]
    assert status == 0, said
    assert [places(event) for event in events_of(whole, "rollback")] == [(16, 10), (19, 5)]
    assert [row["step"] for row in steps_of(whole) if row["skipped"]] == list(broken)
    for stop in (16, 18, 20):
        parts = tmp_path / str(stop)
        first = (*words, f"run_dir={parts}", f"train.stop_after_steps={stop}")
        assert ranks(2, leaping_command, broken, *first)[0][0] == 0
        left = [step - stop for step in broken if step > stop]
        second = (*words, f"run_dir={parts}", "--resume", "latest")
        assert ranks(2, leaping_command, left, *second)[0][0] == 0
        assert [row["loss"] for row in steps_of(whole)] == [row["loss"] for row in steps_of(parts)]
        last = len(steps_of(whole))
        assert sums(parts, last) == sums(whole, last)


def test_checkpoints_to_go_back_to_are_not_pushed_out(ranks, config, tmp_path):
    """Two are kept, and a save is due in each of the steps that spike."""
    words = ("train", config, f"run_dir={tmp_path}", *WATCH, "train.spikes.action=rollback")
    saves = "checkpoint={save_every_steps: 1, keep_last: 2}"
    status, said = ranks(2, leaping_command, range(14, 20), *words, saves)[0]
    assert status == 0, said
    assert [places(event) for event in events_of(tmp_path, "rollback")] == [(16, 13), (19, 12)]
    saved = [event["step"] for event in events_of(tmp_path, "save")]
    assert saved == [*range(1, 14), *range(22, len(steps_of(tmp_path)) + 1)]


def test_a_new_blend_is_no_spike(ranks, tmp_path_factory, tmp_path):
    """One source is random bytes, so its losses are high, and stay so."""
    folder = tmp_path_factory.mktemp("blends")
    config, noise = tiny_config(folder), folder / "noise"
    writer = ShardWriter(noise, np.uint16)
    for document in range(40):
        text = np.random.default_rng(document).integers(0, EOD, 600)
        writer.add(np.append(text, EOD).astype(np.uint16))
    writer.close()
    source = f"{{path: {noise}, vocab_size: {VOCAB}, eod_id: {EOD}}}"
    words = ("train", config, *WATCH, "train.spikes={action: rollback, deviations: 4}")
    words += (f"data.sources.noise={source}", "train.tokens=24000", "optim.lr=3e-2")
    words += ("data.stages=[{tokens: 16000, blend: {tiny: 1}}, {blend: {noise: 1}}]",)
    status, said = ranks(1, leaping_command, [], *words, f"run_dir={tmp_path / 'whole'}")[0]
    assert status == 0, said
    found = steps_of(tmp_path / "whole")
    [first] = [i for i, row in enumerate(found) if row["tokens_seen"] >= 16000][:1]
    assert found[first + 1]["loss"] > found[first]["loss"] + 1
    assert not events_of(tmp_path / "whole", "rollback")
    parts = (*words, f"run_dir={tmp_path / 'parts'}")
    stop = f"train.stop_after_steps={first + 1}"
    assert ranks(1, leaping_command, [], *parts, stop)[0][0] == 0
    assert ranks(1, leaping_command, [], *parts, "--resume", "auto")[0][0] == 0
    assert [row["loss"] for row in steps_of(tmp_path / "parts")] == [row["loss"] for row in found]


def test_without_an_earlier_checkpoint_the_run_says_so(ranks, config, tmp_path):
    words = ("train", config, f"run_dir={tmp_path}", *WATCH, "train.spikes.action=rollback")
    late = "checkpoint.save_every_steps=0"
    status, said = ranks(2, leaping_command, [14, 15, 16], *words, late)[0]
    assert status == 2 and "holds no good checkpoint up to step 13; there are: none" in said
    assert "--resume STEP" in said
