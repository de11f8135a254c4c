"""What is worth another try, and which of many errors is to blame."""

import json

import pytest

from megascale.monitor.events import EventLog
from megascale.monitor.lines import LineFile
from megascale.resilience import failures
from megascale.resilience.failures import (
    FAILURES_WITHOUT_A_SAVE,
    MOST_BACKOFF_S,
    Cause,
    FailureBook,
    culprit,
    verdict,
)


def failure(step, error="boom", saved=None):
    return {"event": "failure", "step": step, "saved": step if saved is None else saved} | {
        "error": error
    }


def test_the_same_failure_three_times_is_a_loop():
    assert verdict([]) is None
    assert verdict([failure(5)] * 2) is None
    assert verdict([failure(5)] * 3) == "3 times the same failure at step 5: boom"
    start = {"event": "start", "step": 0}
    assert verdict([failure(5), start, failure(5), start, failure(5)]) is not None


@pytest.mark.parametrize(
    "others",
    [
        [failure(4), failure(5)],
        [failure(5, "bang"), failure(5)],
        [failure(5), failure(5, "bang")],
        [failure(5), failure(5), {"event": "gave_up"}],
    ],
)
def test_another_step_another_error_or_a_person_in_between_is_none(others):
    assert verdict([*others, failure(5)]) is None


def test_numbers_in_an_error_may_differ():
    at = [failure(5, f"pid {pid} at 0x{pid:x}\nmore of {pid}") for pid in (171, 2822, 93)]
    assert verdict(at) is not None


def test_no_progress_ends_too():
    stuck = [failure(step, f"{'x' * step}", saved=3) for step in range(FAILURES_WITHOUT_A_SAVE)]
    assert verdict(stuck[:-1]) is None
    assert "10 failures in a row without a checkpoint after step 3" in verdict(stuck)
    moving = [failure(step, f"{'x' * step}", saved=step) for step in range(40)]
    assert verdict(moving) is None


def test_whoever_lost_a_peer_is_not_to_blame():
    gone = Cause("RuntimeError: [pair.cc:537] Connection closed by peer", 1.0, rank=0)
    late, later = Cause("killed by SIGKILL", 2.0, rank=3), Cause("ValueError: x", 3.0, rank=1)
    assert culprit([gone, later, late]) is late
    assert culprit([gone]) is gone
    assert str(Cause("oops", 1.0, rank=2, node="n7")) == "rank 2 on node n7: oops"
    assert str(Cause("oops", 1.0, node="n7")) == "node n7: oops"
    assert str(Cause("oops", 1.0)) == "oops"


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def events(run_dir):
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_a_failure_tells_how_far_the_run_was(run_dir):
    book = FailureBook([str(run_dir)], "7")
    assert book.failed(Cause("boom", 0.0)) is None
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints/latest").write_text("00000006\n")
    (run_dir / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8}\n{"st')
    assert book.failed(Cause("boom", 0.0, rank=1, node="n1")) is None
    first, second = events(run_dir)
    assert (first["step"], first["saved"]) == (0, 0)
    assert (second["step"], second["saved"], second["rank"], second["node"]) == (8, 6, 1, "n1")


def test_failures_that_cannot_be_written_down_end_too(run_dir, monkeypatch):
    book = FailureBook([str(run_dir)], "7")
    monkeypatch.setattr(failures, "DIARY_S", 0.0)
    monkeypatch.setattr(LineFile, "settle", lambda lines: False)
    why = f"{run_dir} cannot be written, so failures cannot be counted"
    assert book.failed(Cause("boom", 0.0)) == why


def test_a_growing_run_has_two_folders(run_dir, tmp_path):
    base = tmp_path / "run-base"
    base.mkdir()
    (base / "metrics.jsonl").write_text('{"step": 9}\n')
    book = FailureBook([str(base), str(run_dir)], "7")
    book.failed(Cause("boom", 0.0))
    (run_dir / "metrics.jsonl").write_text('{"step": 2}\n')
    book.failed(Cause("boom", 0.0))
    assert [event["step"] for event in events(run_dir)] == [9, 2]


def test_the_pause_doubles_while_nothing_is_saved(run_dir):
    book, pauses = FailureBook([str(run_dir)], "7"), []
    (run_dir / "checkpoints").mkdir()
    for step in (0, 0, 0, 5):
        (run_dir / "checkpoints/latest").write_text(f"{step:08d}\n")
        book.failed(Cause("x" * (len(pauses) + 1), 0.0))
        pauses.append(book.backoff_s(2.0))
    assert pauses == [2.0, 4.0, 8.0, 2.0]
    assert book.backoff_s(1e6) == MOST_BACKOFF_S


def test_a_job_that_gave_up_stays_so(run_dir):
    book = FailureBook([str(run_dir)], "7")
    assert book.begin() is None
    assert [book.failed(Cause("boom", 0.0)) for _ in range(3)][2] is not None
    assert FailureBook([str(run_dir)], "7").begin() == "3 times the same failure at step 0: boom"
    again = FailureBook([str(run_dir)], "8")
    assert again.begin() is None
    assert again.failed(Cause("boom", 0.0)) is None


def test_jobs_that_end_without_a_word_are_counted(run_dir):
    said = [FailureBook([str(run_dir)], "7").begin() for _ in range(4)]
    assert said[:3] == [None] * 3 and "3 times the same failure" in said[3]
    FailureBook([str(run_dir)], "8").begin()
    FailureBook([str(run_dir)], "8").leave("asked", time_is_up=False)
    assert FailureBook([str(run_dir)], "8").begin() is None
    EventLog(run_dir).write("stop", step=4, asked=True)  # the ranks have, the driver had no time to
    assert FailureBook([str(run_dir)], "8").begin() is None
    assert sum(event["event"] == "failure" for event in events(run_dir)) == 3


def test_errors_of_runs_without_a_launcher_are_not_counted(run_dir):
    """Nor is the launcher before them taken for one that ended without a word."""
    book, log = FailureBook([str(run_dir)], None), EventLog(run_dir)
    assert book.begin(nodes=1) is None
    for _ in range(4):
        log.write("error", step=7, error="boom", rank=0, starting=False)
    assert FailureBook([str(run_dir)], None).begin(nodes=1) is None
    assert not [event for event in events(run_dir) if event["event"] == "failure"]
    assert book.failed(Cause("boom", 0.0)) is None


def test_time_limits_that_are_too_short_are_counted(run_dir):
    (run_dir / "checkpoints").mkdir(parents=True)
    said = []
    for saved in (0, 3, 3, 3, 3):
        book = FailureBook([str(run_dir)], "7")
        assert book.begin() is None
        (run_dir / "checkpoints/latest").write_text(f"{saved:08d}\n")
        (run_dir / "metrics.jsonl").write_text(f'{{"step": {saved}}}\n')
        said.append(book.leave("asked by SIGUSR1", time_is_up=True))
    assert said[:4] == [None] * 4 and "the time limit came before anything new was saved" in said[4]
