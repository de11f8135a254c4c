"""Folders of a driver: gone with it, or with the next one where it was killed."""

import fcntl
import os
import subprocess
import sys

import pytest

from megascale.runtime import scratch
from megascale.runtime.scratch import scratch_folder

HOLD = """
import sys, time
from megascale.runtime.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """(a process that holds a folder, which is long settled; the folder)."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    folder = process.stdout.readline().strip()
    os.utime(folder, (0, 0))
    yield process, folder
    process.kill()
    process.wait()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, holder):
    process, folder = holder
    with scratch_folder(tmp_path) as mine:
        assert os.path.isdir(folder) and mine.is_dir()  # it is held
    assert not mine.exists()
    process.kill()
    process.wait()
    with scratch_folder(tmp_path):
        assert not os.path.exists(folder)


def test_only_own_settled_folders_of_that_name_are_removed(tmp_path, monkeypatch):
    names = ["megascale-driver", ".megascale-driver-data", ".megascale-driver-", "mine"]
    elsewhere = tmp_path / "elsewhere"
    for path in (*(tmp_path / name for name in names), elsewhere):
        path.mkdir()
        (path / "file").touch()
    link, file = tmp_path / ".megascale-driver-aaaaaaaa", tmp_path / ".megascale-driver-bbbbbbbb"
    link.symlink_to(elsewhere)
    file.touch()
    young = tmp_path / ".megascale-driver-cccccccc"
    young.mkdir()
    for path in (*(tmp_path / name for name in names), elsewhere, file):
        os.utime(path, (0, 0))
    before = sorted(tmp_path.iterdir())
    with scratch_folder(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == before and (elsewhere / "file").exists()
    monkeypatch.setattr(scratch, "SETTLED_S", 0.0)
    with scratch_folder(tmp_path):
        pass
    assert not young.exists() and (elsewhere / "file").exists() and file.exists()


def test_a_file_system_without_locks_will_do(tmp_path, holder, monkeypatch):
    def flock(lock, operation):
        raise OSError("Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_folder(tmp_path) as mine:
        assert mine.is_dir() and os.path.isdir(holder[1])
    assert not mine.exists()
