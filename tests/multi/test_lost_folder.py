"""A run whose folder, or disk, is gone for a while trains on and loses nothing."""

import os
from pathlib import Path

import pytest
from test_train import command
from tiny_corpus import rows, tiny_config

WORDS = (
    "train.tokens=12000",
    "data.global_batch_tokens=512",
    "eval.every_steps=0",
    "checkpoint={save_every_steps: 6, keep_last: 9, async_save: false}",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def command_while_gone(between, folder, *words):
    """Like `command`; `folder` is away from the first of two steps until before the second."""
    from megascale.training import loop

    honest, calls = loop.train_step, []
    folder, away = Path(folder), Path(f"{folder}.away")

    def step(*args, **kwargs):
        calls.append(1)
        if os.environ["RANK"] == "0" and len(calls) == between[0]:
            folder.rename(away)
        if os.environ["RANK"] == "0" and len(calls) == between[1]:
            away.rename(folder)
        return honest(*args, **kwargs)

    loop.train_step = step
    try:
        return command(*words)
    finally:
        loop.train_step = honest


@pytest.mark.parametrize("what", [".", "checkpoints"])
def test_a_folder_that_is_gone_for_a_while(ranks, config, tmp_path, what):
    run = tmp_path / "run"
    words = ("train", config, f"run_dir={run}", *WORDS)
    status, said = ranks(2, command_while_gone, (5, 10), run / what, *words)[0]
    assert status == 0, said
    saves = [event for event in rows(run / "events.jsonl") if event["event"] == "save"]
    failed = [event["step"] for event in saves if event["error"]]
    good = [event["step"] for event in saves if not event["error"]]
    last = rows(run / "metrics.jsonl")[-1]["step"]
    assert failed == [6, 7, 9] and good[0] == 12 and good[-1] == last  # after 1 and 2 steps
    steps = [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, last + 1))
    assert "checkpoint at step 6 failed: " in said


def test_a_disk_that_stays_away_is_said_at_the_end(ranks, config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    words = ("train", config, f"run_dir={run}", *WORDS, "train.stop_after_steps=8")
    status, said = ranks(2, quick_command_while_gone, (5, 99), run / "checkpoints", *words)[0]
    assert status == 2, said
    assert "no checkpoint could be written at the end of the run, after step 8: " in said
    assert "--resume auto" in said


def quick_command_while_gone(*words):
    """Like `command_while_gone`, with short pauses at the end."""
    from megascale.training import loop

    usual, loop.LAST_SAVE_PAUSES_S = loop.LAST_SAVE_PAUSES_S, (0.1, 0.1)
    try:
        return command_while_gone(*words)
    finally:
        loop.LAST_SAVE_PAUSES_S = usual
