"""A rank that computes slowly is named, by a real run."""

import os
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from test_train import command
from tiny_corpus import rows, tiny_config

from megascale.checkpoint.load import find

SPENT_S = [0.0]
"""What linear maps of this process have taken, by a clock that only they advance."""
WORDS = (
    "train.tokens=25000",
    "data.global_batch_tokens=512",
    "eval.every_steps=0",
    "monitor.compare_ranks_every_steps=4",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def command_on_a_slow_rank(*words):
    """Like `command`; linear maps take a time that goes with their tokens, twice as long on rank 1.

    So what is timed is the work given, however busy the machine.
    """
    from megascale.model import timing

    honest = timing.ComputeTimer._after

    def after(timer, module, given, result):
        tokens = given[0].shape[0] * given[0].shape[1]
        SPENT_S[0] += 2e-5 * tokens * (1 + int(os.environ["RANK"]))
        return honest(timer, module, given, result)

    clock = SimpleNamespace(perf_counter=lambda: SPENT_S[0])
    with patch.object(timing.ComputeTimer, "_after", after), patch.object(timing, "time", clock):
        return command(*words)


def pinned_command_on_a_slow_rank(*words):
    """The same, as if each rank had a core of its own."""
    with patch.object(os, "sched_getaffinity", lambda _: {int(os.environ["RANK"])}):
        return command_on_a_slow_rank(*words)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_slow_rank_is_named(ranks, config, tmp_path, pinned):
    """To the user where each rank has cores of its own; in the files always."""
    words = ("train", config, *WORDS, f"run_dir={tmp_path}")
    run = pinned_command_on_a_slow_rank if pinned else command_on_a_slow_rank
    status, said = ranks(2, run, *words)[0]
    assert status == 0, said
    named = [event for event in rows(tmp_path / "events.jsonl") if event["event"] == "straggler"]
    assert {event["rank"] for event in named} == {1} and named[0]["node"] == os.uname().nodename
    assert ("rank 1 on " in said) == pinned
    assert ("times as long as others for the same work" in said) == pinned
    compared = rows(tmp_path / "ranks.jsonl")
    assert [row["step"] for row in compared][:3] == [4, 8, 12]
    assert command("plot", tmp_path)[0] == 0
    assert (tmp_path / "plots" / "ranks.png").exists()


def test_a_slow_rank_is_given_less_and_a_resume_knows_it(ranks, config, tmp_path):
    measured = (*WORDS, f"run_dir={tmp_path}", "planner.rank_speeds=measured")
    words = ("train", config, *measured, "--resume", "auto")
    said = ""
    for last in (24, 28):
        status, more = ranks(2, command_on_a_slow_rank, *words, f"train.stop_after_steps={last}")[0]
        said += more
        assert status == 0, said
        found = find(tmp_path, last)
        speeds = found.manifest.position.cursor["speeds"]
    assert speeds["level"][1] > 1.5 and speeds["level"][0] < 1.2  # one comparison gives 1.3 or so
    changes = [event for event in rows(tmp_path / "events.jsonl") if event["event"] == "speeds"]
    assert changes[0]["first"] == changes[0]["step"] + 3 and changes[-1]["slowdown"][1] > 1.2
    assert "on plans count " in said and "rank 1 of the HDP axis as " in said


def seconds_of_steps(*words):
    """(exit status, what it said, seconds of each step) of `command_on_a_slow_rank`."""
    from megascale.training import loop

    spent_s, honest = [], loop.train_step

    def counted(*args, **others):
        begin = SPENT_S[0]
        result = honest(*args, **others)
        spent_s.append(SPENT_S[0] - begin)
        return result

    with patch.object(loop, "train_step", counted):
        return *command_on_a_slow_rank(*words), spent_s


def test_steps_are_quicker_when_a_slow_rank_is_given_less(ranks, config, tmp_path):
    words = ("train.tokens=100K", "data.global_batch_tokens=2048", "train.stop_after_steps=20")
    words += ("eval={every_steps: 0, tokens: 0}", "monitor.compare_ranks_every_steps=2")
    words += ("planner.capacity_tokens=1024",)
    step_s = {}
    for speeds in ("equal", "measured"):
        run = (f"run_dir={tmp_path / speeds}", f"planner.rank_speeds={speeds}")
        answers = ranks(2, seconds_of_steps, "train", config, *WORDS, *words, *run)
        assert answers[0][0] == 0, answers[0][1]
        # a step lasts as long as its slowest rank
        step_s[speeds] = median(map(max, answers[0][2][12:], answers[1][2][12:]))
    assert step_s["measured"] < 0.88 * step_s["equal"], step_s  # 2/3 at best


def test_ranks_may_be_left_uncompared(ranks, config, tmp_path):
    words = ("train", config, *WORDS, f"run_dir={tmp_path}", "train.stop_after_steps=5")
    never = "monitor.compare_ranks_every_steps=0"
    assert ranks(2, command, *words, never)[0][0] == 0
    assert not (tmp_path / "ranks.jsonl").exists()
