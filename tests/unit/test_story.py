"""A run's story: where its time went, as `megascale status` and `megascale report` tell it."""

import errno
import json
import os
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest

from megascale.cli import main
from megascale.commands.report import COLOURS
from megascale.commands.status import shown, start_rows
from megascale.errors import UserError
from megascale.monitor import story as stories
from megascale.monitor.rank_states import read_heartbeats
from megascale.monitor.story import PARTS, read_story
from megascale.runtime.lock import JOB_LOCK, RUN_LOCK, hold

BEGAN = 1_790_000_000.0
CONFIG = """
model: {vocab_size: 257}
data: {sources: {web: {path: none}}, context_tokens: 8, global_batch_tokens: 100}
train: {tokens: 10000}
"""


def event(seconds, kind, **fields):
    now = datetime.fromtimestamp(BEGAN + seconds, UTC).isoformat(timespec="milliseconds")
    return {"time": now, "event": kind, **fields}


def progress(seconds, kind, step, training, **more):
    spent = {"training": training, "planning": 1.0, "evaluation": 2.0, "saving": 3.0}
    return event(seconds, kind, step=step, tokens_seen=100 * step, spent=spent, **more)


FIRST = [
    event(10, "start", began=BEGAN, step=0, world=4),
    progress(60, "progress", 40, 40.0),
    event(65, "skip", step=24),
    event(80, "failure", step=50, error="rank 3: <b>out of memory</b>"),
    event(85, "launch"),
    event(100, "rewind", step=30, last_step=50, step_s=1.5, written=BEGAN + 75),
]
SECOND = [event(101, "start", began=BEGAN + 90, step=30, world=2)]


def row(step, loss=2.0, step_s=1.0):
    numbers = {"tokens_per_s": 100.0, "lr": 1e-3, "grad_norm": 1.0, "skipped": False}
    return {"step": step, "tokens_seen": 100 * step, "loss": loss, "step_s": step_s, **numbers}


@pytest.fixture
def write(tmp_path):
    def folder(events, steps=0, name="run", written=None):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(CONFIG)
        (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
        metrics = run / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, steps + 1)))
        if written is not None:
            os.utime(metrics, (BEGAN + written, BEGAN + written))
        return run

    return folder


def test_lost_time_is_accounted_for(write):
    story = read_story(write([*FIRST, *SECOND, progress(200, "stop", 100, 70.0, asked=False)], 100))
    first, second = story.sessions
    assert (first.first_step, first.last_step, first.ended) == (0, 50, BEGAN + 75)
    assert first.spent["training"] == 40 + 10 * 1.5
    assert first.end == "rank 3: <b>out of memory</b>" and second.end == "done"
    step_s = 55 / 50
    want = {
        "training": 29 * step_s + 70,
        "skipped": step_s,
        "undone": 0,
        "repeated": 20 * step_s,
        "starting": 10 + 11,
        "planning": 2,
        "evaluation": 4,
        "saving": 6,
        "down": 15,
    }
    want["other"] = 200 - sum(want.values())
    assert story.parts == pytest.approx(want) and set(want) == set(PARTS)
    assert story.wall_s == pytest.approx(200) == pytest.approx(sum(story.parts.values()))
    assert story.goodput == pytest.approx(want["training"] / 200)
    assert story.eta_s == 0 and story.state(BEGAN + 1e6) == "done"


def test_a_run_in_progress_is_told_up_to_its_last_step(write):
    story = read_story(write([*FIRST, *SECOND], steps=60, written=131))
    assert story.step == 60 and story.total_steps == 100
    assert story.sessions[-1].last_step == 60
    assert story.sessions[-1].spent["training"] == pytest.approx(30)
    assert story.seconds_per_step == pytest.approx(1.0)
    assert story.eta_s == pytest.approx(40)
    assert story.state(BEGAN + 140) == "training"
    assert story.state(BEGAN + 131 + 121) == "silent: dead or hung"


def test_slow_steps_are_no_silence(write):
    story = read_story(write(SECOND, steps=32, written=101 + 200))  # two steps of 100 s
    assert story.state(BEGAN + 301 + 999) == "training"
    assert story.state(BEGAN + 301 + 1001) == "silent: dead or hung"


def test_before_the_first_step(write):
    assert read_story(write([], name="a")).state(BEGAN) == "has not started"
    story = read_story(write(SECOND, name="b"))
    assert story.state(BEGAN + 110) == "starting" and story.eta_s is None


def test_steps_that_a_rollback_took_back_do_not_count(write):
    """Also those of an earlier start, each once, and not where that rollback was gone back on."""
    events = [
        *FIRST[:2],  # 40 steps in 40 s
        event(61, "failure", error="lost"),
        event(80, "start", began=BEGAN + 70, step=40, world=4),
        event(120, "skip", step=47),
        event(121, "rollback", step=48, to_step=36),  # 4 of the first start, 8 of this one
        event(122, "skip", step=49),
        event(123, "rollback", step=50, to_step=46),  # 49 and 50 are new
        event(125, "rollback", step=60, to_step=55),  # after the checkpoint that is gone on from
        progress(130, "progress", 60, 20.0),
        event(131, "failure", error="lost"),
        event(150, "start", began=BEGAN + 140, step=58, world=4),
        progress(200, "stop", 100, 42.0, asked=False),
    ]
    story = read_story(write(events, 100))
    parts = story.parts
    assert (parts["undone"], parts["repeated"], parts["skipped"]) == (4 + 8 + 2, 2, 0)
    assert parts["training"] == 40 + 20 + 42 - 14 - 2
    assert sum(parts.values()) == pytest.approx(story.wall_s) == 200
    assert COLOURS.keys() == PARTS.keys()


FAILED = [event(1, "launch"), event(2, "attempt"), event(3, "failure", step=0, error="no GPU")]
GAVE_UP = event(4, "gave_up", why="3 times the same failure")


def test_a_run_that_was_given_up_before_it_began_has_a_story(write, capsys):
    run = write([*FAILED, GAVE_UP])
    (run / "config.yaml").unlink()
    assert main(["status", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "given up: 3 times the same failure" in said and "no GPU" in said and "step 0" in said
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "given up: 3 times the same failure" and told["total_steps"] is None
    assert told["failed_starts"] == [{"time": BEGAN + 3, "error": "no GPU"}]
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "given up: 3 times the same failure" in page and "never began" in page


@pytest.mark.parametrize(
    ("more", "state"),
    [
        (FAILED[:1], "starting"),
        (FAILED, "starting again after: no GPU"),
        ([*FAILED, event(4, "attempt")], "starting again after: no GPU"),
        ([*FAILED, GAVE_UP], "given up: 3 times the same failure"),
        ([*FAILED, GAVE_UP, event(5, "launch")], "starting"),
        ([*FAILED, event(4, "leave", why="too few nodes")], "left: too few nodes"),
        ([progress(9, "stop", 9, 1.0, asked=True), event(10, "leave", why="a")], "stopped"),
    ],
)
def test_the_state_is_that_of_the_last_turn(write, more, state):
    before = [*FIRST[:2], event(0, "failure", error="old"), *SECOND]
    assert read_story(write(more, name="a")).state(BEGAN + 11) == state
    story = read_story(write([*before, *more], 40, name="b"))
    assert story.state(BEGAN + 11) == state
    late = story.state(BEGAN + 1000)
    assert late == ("silent: dead or hung" if state.startswith("starting") else state)


@pytest.fixture
def holds():
    """Takes the lock of a run, and gives back what lets go of it."""
    with ExitStack() as leave:

        def take(run, name=RUN_LOCK):
            file = leave.enter_context((run / name).open("a+"))
            assert hold(file, 0.0) is None
            os.utime(run / name, (BEGAN + 95, BEGAN + 95))
            return file

        yield take


COMMAND = "torchrun --nproc-per-node 2 -m megascale train c.yaml --resume auto"


def test_a_killed_run_is_not_training(write, holds, capsys):
    """Whether it is known from the lock, at once; how to go on is said by status and report."""
    run = write([*FIRST, {**SECOND[0], "command": COMMAND}], steps=60, written=131)
    lock = holds(run)
    assert read_story(run).state(BEGAN + 140) == "training"
    assert "alive, perhaps hung" in read_story(run).state(BEGAN + 1000)
    assert read_story(run).resume_command(BEGAN + 140) is None
    assert read_story(run).resume_command(BEGAN + 1000) is None
    lock.close()
    story = read_story(run)
    for now in (140, 1000):
        assert story.state(BEGAN + now) == "killed at step 60: its process ended without a word"
    assert start_rows(story, BEGAN + 140)[-1][-1].startswith("killed at step 60")
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "killed at step 60" in " ".join(said.split()) and "ETA" not in said
    assert said.endswith(f"continue it with:\n  {COMMAND}\n")
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["eta_s"] is None and told["resume_command"] == COMMAND
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "killed at step 60" in page and COMMAND in page and "time left" not in page


def test_a_launcher_that_lives_starts_again(write, holds):
    run = write([*FIRST, *SECOND], steps=60, written=131)
    holds(run).close()
    job = holds(run, JOB_LOCK)
    assert read_story(run).state(BEGAN + 140) == "ended; the launcher decides what follows"
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps(event(150, "failure", step=60, error="rank 1: killed")) + "\n")
    for now in (151, 1000):
        assert read_story(run).state(BEGAN + now) == "starting again after: rank 1: killed"
    job.close()
    assert read_story(run).state(BEGAN + 151) == "killed with its launcher after: rank 1: killed"


def test_a_resume_that_loads_is_starting(write, holds):
    run = write([*SECOND, progress(200, "stop", 100, 70.0, asked=True)], 100)
    holds(run)
    assert read_story(run).state(BEGAN + 210) == "stopped"  # it has not let go yet
    os.utime(run / RUN_LOCK, (BEGAN + 205, BEGAN + 205))
    assert read_story(run).state(BEGAN + 210) == "starting"


def test_a_lock_that_changed_while_files_were_read_says_nothing(write, holds, monkeypatch):
    """A run that began and ended in between has not been killed."""
    run = write(SECOND, steps=60, written=131)
    holds(run).close()
    honest = stories.read_events

    def meanwhile(folder):
        events = honest(folder)
        with (run / RUN_LOCK).open("a+") as file:
            hold(file, 0.0)
        return events

    monkeypatch.setattr(stories, "read_events", meanwhile)
    assert read_story(run).state(BEGAN + 140) == "training"


def test_an_error_is_the_end_of_its_start(write):
    failed = event(150, "error", step=60, error="UserError: no room", rank=1, starting=False)
    run = write([*FIRST, *SECOND, failed], steps=60, written=131)
    story = read_story(run)
    assert story.state(BEGAN + 151) == story.state(BEGAN + 1e6) == "failed: UserError: no room"
    assert story.sessions[-1].end == "UserError: no room"
    assert story.sessions[-1].ended == BEGAN + 150 and not list(story.failed_starts)
    assert story.resume_command(BEGAN + 151) == "the command that started it, with --resume auto"


def test_a_refused_start_is_not_the_end_of_the_one_before(write):
    refused = event(300, "error", step=60, error="seed was 1", rank=0, starting=True)
    run = write([*SECOND, refused], steps=60, written=131)
    story = read_story(run)
    assert story.state(BEGAN + 301) == "could not start: seed was 1"
    assert story.sessions[-1].end is None and story.sessions[-1].ended == BEGAN + 131
    ends = [cells[-1] for cells in start_rows(story, BEGAN + 301)]
    assert ends == ["no word: killed, or its node was lost", "seed was 1"]


def test_failures_without_a_start_stand_among_the_starts(write):
    story = read_story(write([*FIRST, *FAILED[1:], *SECOND], 40, written=131))
    assert [one["error"] for one in story.failed_starts] == ["no GPU"]
    ends = [row[-1] for row in start_rows(story, BEGAN + 1e6)]
    assert ends == ["rank 3: <b>out of memory</b>", "no GPU", "silent: dead or hung"]


def test_damaged_rows_are_left_out(write, capsys):
    whole = [*FIRST, *SECOND]
    start, told = SECOND[0], progress(150, "progress", 50, 9.0)
    damaged = [
        {key: value for key, value in start.items() if key != "began"},
        {key: value for key, value in start.items() if key != "time"},
        {**start, "time": "yesterday"},
        {key: value for key, value in told.items() if key != "spent"},
        event(150, "rollback", step=50),
        event(150, "rewind", step=50),
        event(150, "skip"),
    ]
    run = write([*whole, *damaged], 60)
    good = (run / "metrics.jsonl").read_text()
    row_61 = row(61)
    del row_61["tokens_seen"]
    (run / "metrics.jsonl").write_text(good + json.dumps(row_61) + "\n")
    (run / "heartbeats.json").write_text("{}")
    story, expected = read_story(run), read_story(write(whole, 60, name="whole"))
    assert story.events == expected.events and story.last == expected.last
    for words in (["status"], ["status", "--json"], ["report"]):
        assert main([*words, str(run)]) == 0


def test_a_report_that_cannot_be_written_leaves_the_old_one(write, monkeypatch, capsys):
    run = write([*FIRST, *SECOND])
    assert main(["report", str(run)]) == 0
    old = (run / "report.html").read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(run.iterdir())
    assert main(["report", str(run)]) == 2
    assert "report.html: No space left on device" in capsys.readouterr().err
    assert sorted(run.iterdir()) == before and (run / "report.html").read_bytes() == old


def test_status_for_people_and_programs(write, capsys):
    run = write([*FIRST, *SECOND, progress(200, "stop", 100, 70.0, asked=True)], 100)
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "stopped" in said and "step 100 of 100" in said and "repeated" in said
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["starts"][0]["end"] == "rank 3: <b>out of memory</b>"
    assert sum(told["parts_s"].values()) == pytest.approx(told["wall_s"])


def test_status_shows_how_the_ranks_are(write, capsys):
    from rich.console import Console

    run = write([*FIRST, *SECOND], steps=60, written=131)
    one = {"rank": 0, "node": "n0", "pid": 1, "state": "runs", "step": 61, "phase": "gradients",
           "waits": True, "calls": 7, "last": "all-reduce", "quiet_s": 9.0, "memory_mib": 1234,
           "device_mib": 0}  # fmt: skip
    quiet = {"rank": 1, "node": "n[1]", "state": "stopped by a signal", "quiet_s": 11.0}
    told = {"time": BEGAN + 139, "ranks": [one, {**one, **quiet}]}
    (run / "heartbeats.json").write_text(json.dumps(told))
    console = Console(markup=False, width=120)
    console.print(shown(run, read_story(run), BEGAN + 140))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert " ".join(rows[0]) == "1 n[1] 61 stopped by a signal all-reduce 7 11s 1,234 MiB"
    assert " ".join(rows[1]) == "0 n0 61 waiting for others all-reduce 7 9s 1,234 MiB"
    assert read_heartbeats(run, BEGAN + 139 + 121) is None
    (run / "heartbeats.json").write_text("{")
    assert read_heartbeats(run, BEGAN + 140) is None


def test_bad_input(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no run: no config.yaml and no event there"):
        read_story(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert main(["status", str(tmp_path), "--json", "--watch"]) == 2
    assert "leave one out" in capsys.readouterr().err


def test_the_report_is_one_page_that_quotes_what_it_shows(write, capsys):
    run = write([*FIRST, *SECOND], 60, name='a <run> & "more"')
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "&lt;b&gt;out of memory" in page and "<b>" not in page
    assert "a &lt;run&gt; &amp; " in page and "<run>" not in page
    for word in ("http:", "https:", "<script", "<link", 'src="'):
        assert page.count(word) == page.count('src="data:image/png;base64,') * (word == 'src="')
    assert page.count("<img") == 4  # no held-out text, no experts
    assert "global_batch_tokens: 100" in page
    assert main(["report", str(run), "--out", str(run / "config.yaml" / "x.html")]) == 2
    assert main(["report", str(run), "--out", "/dev/null"]) == 0
    assert not os.path.isfile("/dev/null")  # no file has taken its place
