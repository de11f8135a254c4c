"""What is worth another try, and which of many errors is to blame."""

import json

import pytest

from megascale.launch import failures
from megascale.launch.failures import (
    FAILURES_WITHOUT_A_SAVE,
    KILL,
    KILLS_AT_START,
    MOST_BACKOFF_S,
    Cause,
    FailureBook,
    cause_of_rank,
    culprit,
    verdict,
)
from megascale.monitor.events import EventLog
from megascale.monitor.lines import LineFile


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
    count = KILLS_AT_START
    said = [FailureBook([str(run_dir)], "7").begin() for _ in range(count + 1)]
    assert said[:count] == [None] * count
    assert said[count].startswith(
        f"{count} attempts in a row ended before their first step: the job"
    )
    FailureBook([str(run_dir)], "8").begin()
    FailureBook([str(run_dir)], "8").leave("asked", time_is_up=False)
    assert FailureBook([str(run_dir)], "8").begin() is None
    EventLog(run_dir).write("stop", step=4, asked=True)  # the ranks have, the driver had no time to
    assert FailureBook([str(run_dir)], "8").begin() is None
    assert sum(event["event"] == "failure" for event in events(run_dir)) == count


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


def killed(step=0, starting=True, error="killed by SIGKILL"):
    return failure(step, error, saved=0) | {"cause": KILL, "starting": starting}


def test_kills_before_the_first_step_are_no_crash_loop():
    assert verdict([killed()] * (KILLS_AT_START - 1)) is None
    assert "20 attempts in a row ended before their first step" in verdict([killed()] * 20)
    assert verdict([killed(starting=False)] * 3) is not None  # at a step it may be its memory
    assert verdict([killed()] * 15 + [failure(3), *[killed(3)] * 15]) is None


def test_kills_at_the_start_do_not_hide_an_error():
    boom = failure(0) | {"cause": "fault", "starting": True}
    assert verdict([boom, killed(), killed(), boom, killed()]) is None
    assert verdict([boom, killed(), killed(), boom, killed(), boom]) is not None


def test_bad_input_is_given_up_at_once_only_before_the_first_step():
    mistake = failure(4, "UserError: seed was 7") | {"cause": "mistake"}
    assert "mended first: UserError: seed" in verdict([mistake | {"starting": True}])
    assert verdict([mistake | {"starting": False}]) is None


@pytest.mark.parametrize(
    "status, message, said, kind",
    [
        (-9, None, "killed by SIGKILL", "kill"),
        (-15, "RuntimeError: x", "killed by SIGTERM", "kill"),
        (-11, None, "killed by SIGSEGV", "fault"),
        (2, "UserError: no corpus", "UserError: no corpus", "mistake"),
        (2, "RankError: document 7", "RankError: document 7", "fault"),
        (2, "StorageError: stale", "StorageError: stale", "fault"),
        (1, "UserError: of a library", "UserError: of a library", "fault"),
        (2, None, "ended with status 2", "fault"),
    ],
)
def test_how_a_rank_ended_says_whose_fault_it_is(status, message, said, kind):
    cause = cause_of_rank(3, status, message, 1.0)
    assert (cause.error, cause.kind, cause.rank) == (said, kind, 3)


def test_an_attempt_has_stepped_when_its_start_is_behind_it(run_dir, tmp_path):
    base = tmp_path / "run-base"
    book = FailureBook([str(base), str(run_dir)], "7")
    seen = [book.has_stepped()]
    for folder, step in ((base, 2), (base, 5), (run_dir, 0), (run_dir, 1)):
        folder.mkdir(exist_ok=True)
        EventLog(folder).write("start", step=2 if folder == base else 0)
        if step:
            (folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        seen.append(book.has_stepped())
    book.attempt(number=1)
    assert [*seen, book.has_stepped()] == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    "errors, saved, gives_up",
    [
        (["No space left"], None, True),
        (["No space left", None], None, False),
        (["No space left"], 3, False),
        ([], None, False),
    ],
)
def test_a_run_that_never_could_save_is_not_started_again(run_dir, errors, saved, gives_up):
    book = FailureBook([str(run_dir)], "7")
    for error in errors:
        EventLog(run_dir).write("save", step=3, error=error)
    if saved is not None:
        (run_dir / "checkpoints").mkdir()
        (run_dir / "checkpoints/latest").write_text(f"{saved:08d}\n")
    why = book.failed(Cause("killed by SIGKILL", 0.0, rank=0, kind=KILL))
    assert (why is not None) == gives_up
    assert why is None or why.startswith("no checkpoint could be written (No space left), so it")
    assert not gives_up or FailureBook([str(run_dir)], "8").begin() is None
    assert book.failed(Cause("boom", 0.0)) is None or not gives_up  # whoever starts it again may
