"""However a run ends, its folder says so, once, and `status` tells it at once."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_train import TINY, command, command_with_broken_steps
from tiny_corpus import rows, tiny_config

from megascale.errors import RankError, UserError
from megascale.monitor import lines
from megascale.run.folder import noting_errors


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def errors(run_dir):
    """What the error events of a run say."""
    return [event for event in rows(run_dir / "events.jsonl") if event["event"] == "error"]


def status(run_dir, capsys):
    from megascale.cli import main

    assert main(["status", str(run_dir), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class OneRank:
    """As much of `Ranks` as is needed to write an event."""

    rank = 3


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("the loss stays too high"), "the loss stays too high"),
        (RankError("document 7"), "document 7"),
        (RuntimeError("\n gloo: closed by peer\nmore"), "RuntimeError: gloo: closed by peer"),
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (KeyboardInterrupt(), "stopped at once by a second signal"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_every_error_is_one_line_and_written_once(tmp_path, error, said):
    for _ in range(2):
        with pytest.raises(type(error)), noting_errors(tmp_path, OneRank()):
            with noting_errors(tmp_path, OneRank()):  # as another rank does
                raise error
        time.sleep(0.01)
    first, second = errors(tmp_path)
    assert first["error"] == second["error"] == said and first["rank"] == 3


def test_under_a_launcher_the_launcher_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "attempt-0")
    with pytest.raises(MemoryError), noting_errors(tmp_path, OneRank()):
        raise MemoryError
    assert not (tmp_path / "events.jsonl").exists()


def test_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(file, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lines, "_write_all", full)
    with pytest.raises(UserError, match="no room"), noting_errors(tmp_path, OneRank()):
        raise UserError("no room")


def test_an_own_error_is_the_end(ranks, config, tmp_path, capsys):
    words = ["train", config, f"run_dir={tmp_path}", *TINY, "optim.max_skipped_steps=3"]
    answers = ranks(2, command_with_broken_steps, [2, 3, 4], *words)
    assert [answer[0] for answer in answers] == [2, 2]
    [event] = errors(tmp_path)
    assert event["error"].startswith("3 steps in a row up to step 4") and event["step"] == 4
    assert not event["starting"]
    told = status(tmp_path, capsys)
    assert told["state"] == f"failed: {event['error']}" and told["eta_s"] is None
    assert " --ranks 2 --resume auto" in told["resume_command"]


def test_a_refused_resume_is_told(ranks, config, tmp_path, capsys):
    words = ("train", config, f"run_dir={tmp_path}", *TINY)
    assert ranks(1, command, *words, "train.stop_after_steps=2")[0][0] == 0
    assert ranks(2, command, *words, "seed=7", "--resume", "auto")[0][0] == 2
    [event] = errors(tmp_path)
    assert event["starting"] and event["error"].startswith("seed was 1234")
    told = status(tmp_path, capsys)
    assert told["state"].startswith("could not start: seed was 1234")
    assert told["starts"][-1]["end"] == "done" and len(told["failed_starts"]) == 1
    assert ranks(2, command, *words, "--resume", "auto")[0][0] == 0
    assert status(tmp_path, capsys)["state"] == "done"


FAILING = """
import os, sys
from megascale.training import step
honest, calls = step.run_micro_batches, []
def failing(*words, **more):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 4:
        raise MemoryError("no room on rank 1")
    return honest(*words, **more)
from megascale import cli
from megascale.runtime import distributed
distributed.prepare_device("cpu")
step.run_micro_batches = failing
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_of_several_ranks_the_one_that_failed_speaks(config, tmp_path, capsys):
    script, run = tmp_path / "failing.py", tmp_path / "run"
    script.write_text(FAILING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [script, "train", config, f"run_dir={run}", *TINY]
    done = subprocess.run([*torchrun, *map(str, words)], capture_output=True, text=True)
    assert done.returncode != 0
    [event] = errors(run)
    assert (event["error"], event["rank"]) == ("MemoryError: no room on rank 1", 1), done.stderr
    assert status(run, capsys)["state"] == "failed: MemoryError: no room on rank 1"


@pytest.mark.slow
def test_a_killed_run_is_known_at_once(config, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", config, f"run_dir={run}", "train.tokens=100M", "eval.every_steps=0"]
    process = subprocess.Popen([sys.executable, "-m", "megascale", *map(str, words)])
    try:
        metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        told = status(run, capsys)
        assert told["state"] == "training" and told["resume_command"] is None
        assert status(run, capsys)["state"] == "training"  # asking has broken no lock
    finally:
        process.kill()
        process.wait()
    told = status(run, capsys)
    assert told["state"].startswith(f"killed at step {told['step']}: ") and told["step"] >= 4
    assert told["resume_command"].startswith(f"megascale train {config} run_dir={run}")
    assert told["resume_command"].endswith("--resume auto") and not errors(run)


@pytest.mark.slow
def test_a_launcher_that_is_stopped_at_once_says_so(config, tmp_path):
    run = tmp_path / "run"
    words = ["launch", config, "--ranks-per-node", "1", f"run_dir={run}", "train.tokens=100M"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megascale", *map(str, words)], start_new_session=True
    )
    try:
        events, deadline = run / "events.jsonl", time.monotonic() + 120
        while not events.exists() or b'"start"' not in events.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        rank = next(iter(pids_of(run)))
        os.kill(rank, signal.SIGSTOP)  # so that it does not stop by itself
        process.send_signal(signal.SIGINT)
        time.sleep(2.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    ends = [event for event in rows(events) if event["event"] in ("leave", "failure", "error")]
    assert [event["event"] for event in ends] == ["leave"]
    assert ends[0]["why"] == "stopped at once by a second signal"


def pids_of(run):
    """The process that holds a run's folder."""
    yield int((run / ".lock").read_text().split()[1])
