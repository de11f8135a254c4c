"""A tracker that fails, hangs or is slow costs its own rows and nothing else."""

import subprocess
import sys
import threading
import time

import pytest

from megascale.monitor.background import TRIES, Background

QUICK = (0.001,)


class Store:
    """Takes rows; `fails` is asked before each."""

    def __init__(self, fails=lambda step: False):
        self.rows, self.closed, self._fails = [], False, fails

    def log(self, values, step):
        if self._fails(step):
            raise ConnectionError(f"no server\nfor step {step}")
        self.rows.append((step, dict(values)))

    def close(self):
        self.closed = True


def background(store, **options):
    options = {"pauses_s": QUICK, **options}
    return Background("store", lambda notice: store, **options)


def ended(worker, seconds=20.0):
    worker.finish()
    worker.join(time.monotonic() + seconds)
    return worker.notices()


def test_rows_arrive_in_order_and_nothing_is_said():
    store = Store()
    worker = background(store)
    for step in range(500):
        worker.put({"loss": step / 2}, step)
    assert ended(worker) == []
    assert store.rows == [(step, {"loss": step / 2}) for step in range(500)] and store.closed


def test_failures_are_one_warning_and_one_all_clear_and_a_count(caplog):
    store = Store(fails=lambda step: step % 10 == 3)
    worker = background(store)
    for step in range(50):
        worker.put({"loss": 1.0}, step)
    warning, again, missing = ended(worker)
    assert "ConnectionError: no server for step 3" in warning and "metrics.jsonl" in warning
    assert again == "answers again"
    assert missing.startswith("5 of 50 rows did not arrive")
    assert [step for step, _ in store.rows] == [step for step in range(50) if step % 10 != 3]
    assert len(caplog.records) == 1 and caplog.records[0].exc_info


def test_a_row_is_tried_again():
    tries = []

    def fails(step):
        tries.append(step)
        return tries.count(step) < TRIES

    store = Store(fails)
    worker = background(store)
    worker.put({}, 7)
    while not store.rows:
        time.sleep(0.001)
    assert tries == [7] * TRIES
    assert "no server" in ended(worker)[0]


def test_a_tracker_that_cannot_start_is_tried_again_and_loses_nothing():
    store, starts = Store(), []

    def start(notice):
        starts.append(1)
        if len(starts) < 4:
            raise OSError("no route to host")
        notice("begins anew")
        return store

    worker = Background("store", start, pauses_s=QUICK)
    worker.put({"loss": 1.0}, 1)
    while not store.rows:
        time.sleep(0.001)
    warning, *others = ended(worker)
    assert "no route to host" in warning and sorted(others) == ["answers again", "begins anew"]
    assert store.rows == [(1, {"loss": 1.0})]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_tracker_that_ends_the_process_does_not(kind):
    def start(notice):
        raise kind("wandb: not logged in")

    worker = Background("store", start, pauses_s=QUICK)
    worker.put({}, 1)
    notices = ended(worker)
    assert f"{kind.__name__}: wandb: not logged in" in notices[0] and "1 of 1 rows" in notices[1]


class Hanging:
    """Does not come back from `call` until it is let go."""

    def __init__(self, call):
        self.entered, self.go = threading.Event(), threading.Event()
        self._call = call

    def _maybe(self, call):
        if call == self._call:
            self.entered.set()
            assert self.go.wait(60)

    def log(self, values, step):
        self._maybe("log")

    def close(self):
        self._maybe("close")


@pytest.mark.parametrize("call", ["start", "log", "close"])
def test_a_hanging_tracker_holds_nobody_up(call):
    hanging = Hanging(call)

    def start(notice):
        hanging._maybe("start")
        return hanging

    worker = Background("store", start, room=10, slow_s=0.0, pauses_s=QUICK)
    began = time.monotonic()
    if call != "close":
        worker.put({}, 0)
        assert hanging.entered.wait(60)
        time.sleep(0.01)
    for step in range(1, 101):
        worker.put({}, step)
    assert time.monotonic() - began < 10
    notices = ended(worker, seconds=0.2)
    assert any("did not finish in time" in notice for notice in notices)
    if call != "close":
        assert sum("has not answered" in notice for notice in notices) == 1
        assert f"{101} of {101} rows did not arrive" in notices[-1]
    hanging.go.set()
    worker.join(time.monotonic() + 20)
    if call == "log":  # the first was under way, and of the others the newest were kept
        assert worker.notices() == [
            "answers again",
            "90 of 101 rows did not arrive; metrics.jsonl has all of them",
        ]


def test_a_process_ends_though_a_thread_and_an_exit_hook_hang():
    script = """
import atexit, sys, threading, time
from megascale.runtime import process_exit as leaving
leaving.bound_exit(0.3)
leaving.bound_exit(0.3)
atexit.register(time.sleep, 300)
threading.Thread(target=time.sleep, args=(300,)).start()
print("written")
if sys.argv[1] == "raise":
    raise RuntimeError("the run failed")
leaving.ends_with(int(sys.argv[1]))
"""
    for word, status in (("0", 0), ("2", 2), ("raise", 1)):
        done = subprocess.run(
            [sys.executable, "-c", script, word], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (status, "written\n")
        assert ("the run failed" in done.stderr) == (word == "raise")
