"""Who holds a file: asked without taking the lock, and believed no further than it can be."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from megascale.runtime import lock
from megascale.runtime.lock import Holding, ask, hold

HOLDER = """
import sys, time
from megascale.runtime.lock import hold
file = open(sys.argv[1], "a+")
assert hold(file, 0.0) is None
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """(a process that holds a file, the file)."""
    path = tmp_path / "lock"
    words = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process, path
    process.kill()
    process.wait()


def test_a_killed_holder_is_known_at_once(holder):
    process, path = holder
    assert ask(path) == Holding(True, path.stat().st_mtime)
    with path.open("a+") as file:
        assert hold(file, 0.0).startswith(f"process {process.pid} on ")
    assert ask(path).held is True  # neither question has broken the lock
    process.kill()
    process.wait()
    assert ask(path).held is False
    with path.open("a+") as file:
        assert hold(file, 0.0) is None


def test_asking_refuses_nobody(tmp_path):
    path, stop, seen = tmp_path / "lock", threading.Event(), set()

    def keep_asking():
        while not stop.is_set():
            seen.add(ask(path).held)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        for _ in range(2000):
            with path.open("a+") as file:
                assert hold(file, 0.0) is None
    finally:
        stop.set()
        asking.join()
    assert {True, False} <= seen


def test_what_cannot_be_known_is_not_claimed(holder, monkeypatch, tmp_path):
    process, path = holder
    assert ask(tmp_path / "none") == Holding(None, 0.0)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock, "_kernel", lambda: "another machine")
        assert ask(path).held is True
    process.kill()
    process.wait()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock, "_kernel", lambda: "another machine")
        assert ask(path).held is None
    path.write_text("process 1 on node7")  # as earlier versions write it
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ask(path).held is None
        with path.open("a+") as other:
            assert hold(other, 0.0) == "process 1 on node7"


def test_a_file_system_without_such_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = tmp_path / "lock"
    with path.open("a+") as file:
        with monkeypatch.context() as without:
            without.setattr(fcntl, "fcntl", refuse)
            assert hold(file, 0.0) is None
            assert ask(path) == Holding(None, 0.0)
        assert ask(path).held is None  # its holder could not take what can be asked for
