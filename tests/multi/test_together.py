"""What rank 0 does for all ranks: results and errors reach every rank, and nobody waits."""

import contextlib
import errno
import os
from unittest.mock import patch

import pytest
from test_train import command
from tiny_corpus import tiny_config

from megascale.errors import UserError

SHORT = ("train.tokens=3000", "eval.every_steps=0", "checkpoint.save_every_steps=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def fail(kind):
    """What rank 0 meets."""
    if kind == "user":
        raise UserError("set x=1")
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "plan.txt")
    if kind == "mistake":
        raise ZeroDivisionError("a \N{GREEK SMALL LETTER MU} of nothing")
    return b"\0 a result"


def ask(config, kind):
    """(what this rank got or met, whether rank 0's traceback is noted, the next collective)."""
    from megascale.run.resolve import load_run
    from megascale.runtime import distributed
    from megascale.runtime.first_rank import from_first_rank, on_first_rank

    ranks, calls, met, notes = distributed.start(load_run(config)[0]), [], [], ""
    for run in (from_first_rank, on_first_rank):
        try:
            met.append(run(ranks, lambda: calls.append(1) or fail(kind)))
        except Exception as error:
            met.append(f"{type(error).__name__}: {error}")
            notes = "".join(getattr(error, "__notes__", []))
    traced = "in fail\n" in notes and "ZeroDivisionError" in notes
    return met, traced, len(calls), from_first_rank(ranks, lambda: b"next")


@pytest.mark.parametrize("world", [1, 3])
def test_results_of_rank_0_reach_every_rank(ranks, config, world):
    first, *others = ranks(world, ask, config, None)
    assert first == ([b"\0 a result"] * 2, False, 2, b"next")
    assert others == [([b"\0 a result", None], False, 0, b"next")] * (world - 1)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "kind, expected",
    [
        ("user", "UserError: set x=1"),
        (
            "full",
            "StorageError: plan.txt: No space left on device; make room there, or give another "
            "path",
        ),
    ],
)
def test_what_a_user_can_mend_is_the_same_line_everywhere(ranks, config, world, kind, expected):
    first, *others = ranks(world, ask, config, kind)
    assert first == ([expected] * 2, False, 2, b"next")
    assert others == [([expected] * 2, False, 0, b"next")] * (world - 1)


def test_a_mistake_reaches_every_rank_with_its_traceback(ranks, config):
    what = "ZeroDivisionError: a \N{GREEK SMALL LETTER MU} of nothing"
    first, *others = ranks(3, ask, config, "mistake")
    assert first == ([what] * 2, False, 2, b"next")
    assert others == [([f"FirstRankError: on rank 0: {what}"] * 2, True, 0, b"next")] * 2


def test_other_ranks_are_not_to_blame():
    from megascale.launch.failures import Cause, culprit

    follower = Cause("FirstRankError: on rank 0: ZeroDivisionError: a mistake", 1.0, rank=1)
    first = Cause("ZeroDivisionError: a mistake", 2.0, rank=0)
    assert culprit([follower, first]) is first


# --------------------------------------------------------------------------------- inside of runs

PLACES = {
    "plan of held-out text": "megascale.training.begin.plan_lengths",
    "description": "megascale.training.begin.describe_run",
    "files of the recorder": "megascale.training.recorder.MetricsWriter",
    "folder of checkpoints": "megascale.checkpoint.folder.remove_leftovers",
    "choice of checkpoint": "megascale.checkpoint.load._candidates",
    "planner process": "megascale.training.feed.PlansAhead",
    "cover of checkpoints": "megascale.checkpoint.save.check_cover",
    "problem of a plan": "megascale.training.begin.step_problem",
    "identity of copies": "megascale.checkpoint.emergency.secrets.token_hex",
}


def command_that_fails(place, kind, *words):
    """(exit status or error, what it said) of `command`, where rank 0 fails at `place`."""
    fails = patch(PLACES[place], lambda *args, **kwargs: fail(kind))
    with fails if os.environ["RANK"] == "0" else contextlib.nullcontext():
        try:
            return command(*words)
        except Exception as error:
            return type(error).__name__, str(error)


@pytest.mark.parametrize("place", PLACES)
def test_what_rank_0_cannot_do_ends_all_ranks_with_one_line(ranks, config, tmp_path, place):
    words = ["train", config, f"run_dir={tmp_path / 'run'}", *SHORT]
    words += ["--resume", "auto"] * (place == "choice of checkpoint")
    copies = [f"checkpoint.emergency_dir={tmp_path}", "checkpoint.emergency_every_steps=1"]
    words += copies * (place == "identity of copies")
    first, second = ranks(2, command_that_fails, place, "user", *words)
    assert first[0] == second[0] == 2, (first, second)
    assert first[1].endswith("megascale: set x=1\n") and second[1] == ""


def test_a_mistake_on_rank_0_is_in_the_log_of_every_rank(ranks, config, tmp_path):
    run = tmp_path / "run"
    words = ("train", config, f"run_dir={run}", *SHORT)
    place = "plan of held-out text"
    first, second = ranks(2, command_that_fails, place, "mistake", *words)
    assert (first[0], second[0]) == ("ZeroDivisionError", "FirstRankError")
    for rank in (0, 1):
        log = (run / "logs" / f"rank{rank}.log").read_text()
        assert "in fail\n" in log and "ZeroDivisionError: a" in log


def steps_planned(*words):
    """(exit status, how often this rank planned step 0 for the description of the run)."""
    from megascale.run import describe

    with patch.object(describe, "first_step", wraps=describe.first_step) as planned:
        status, _ = command(*words)
    return status, planned.call_count


def test_only_rank_0_plans_what_it_describes(ranks, config, tmp_path):
    words = ("train", config, f"run_dir={tmp_path / 'run'}", *SHORT)
    assert ranks(3, steps_planned, *words) == [(0, 1), (0, 0), (0, 0)]
    assert "step 0 " in (tmp_path / "run" / "plan.txt").read_text()
