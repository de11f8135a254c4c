"""`megascale.train` of the library, on ranks."""

import sys
import time

import pytest
import torch
from tiny_corpus import rows, tiny_config

from megascale.checkpoint.folder import read_latest

WORDS = ("train.tokens=5000", "eval.every_steps=0")


def trained(config, run_dir):
    """What two calls return, a run and its continuation; of the second run the last row."""
    import megascale

    first = megascale.train(config, [*WORDS, f"run_dir={run_dir}", "train.stop_after_steps=2"])
    again = megascale.train(config, [*WORDS, f"run_dir={run_dir}"], resume="auto")
    return first, again, megascale.read_metrics(run_dir)[-1]["tokens_seen"]


def after_a_refusal(config, run_dir):
    """What a user does in a notebook: train where a run is, read the error, and follow it."""
    import megascale
    from megascale.errors import UserError

    words = [*WORDS, f"run_dir={run_dir}", "train.stop_after_steps=1"]
    hook, threads = sys.excepthook, torch.get_num_threads()
    calls = [time.time()]
    megascale.train(config, words)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume auto"):
        megascale.train(config, words)
    for resume in ("auto", 1):
        calls.append(time.time())
        megascale.train(config, words, resume=resume)
    assert sys.excepthook is hook and torch.get_num_threads() == threads
    return calls


def test_what_an_error_advises_can_be_done_in_the_same_process(ranks, tmp_path):
    config, run = str(tiny_config(tmp_path)), tmp_path / "run"
    [calls] = ranks(1, after_a_refusal, config, str(run))
    starts = [event for event in rows(run / "events.jsonl") if event["event"] == "start"]
    assert len(starts) == len(calls) == 3
    for event, called in zip(starts, calls, strict=True):  # of the process it would be long before
        assert event["began"] >= round(called, 3)


def in_a_thread(config, run_dir):
    from concurrent.futures import ThreadPoolExecutor

    import megascale

    words = [*WORDS, f"run_dir={run_dir}", "train.stop_after_steps=1"]
    with ThreadPoolExecutor() as pool:
        return pool.submit(megascale.train, config, words).result()


def test_a_run_in_a_thread_hears_no_signals(ranks, tmp_path):
    assert ranks(1, in_a_thread, str(tiny_config(tmp_path)), str(tmp_path / "run")) == [False]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_and_its_continuation(ranks, tmp_path, world):
    config = str(tiny_config(tmp_path))
    for first, again, tokens in ranks(world, trained, config, str(tmp_path / "run")):
        assert (first, again) == (False, False) and tokens >= 5000
    assert read_latest(tmp_path / "run/checkpoints") == 5
