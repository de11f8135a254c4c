"""Files and folders that cannot be read, or are none: one line, status 2, and no waiting."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_corpus import tiny_config

from megascale.cli import main
from megascale.errors import RankError, file_problem, plain_file_errors
from megascale.monitor.events import read_events
from megascale.monitor.metrics import read_rows
from megascale.parsing import MOST_ROW_BYTES, read_json, read_json_rows, read_yaml_text
from megascale.reading import open_regular, read_whole
from megascale.runtime.files import open_lock, open_to_append
from megascale.runtime.first_rank import error_bytes, error_from

ROOT = Path(__file__).parents[2]
EVENT = '{"time": "2026-01-01T00:00:00+00:00", "event": "start", "step": 0}\n'
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""So that permissions count for root too."""


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def loop(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path)


ODD = {
    pipe: "a named pipe where a regular file must be",
    endless: "a device where a regular file must be",
    folder: "Is a directory",
    loop: "Too many levels of symbolic links",
}
odd = pytest.mark.parametrize("make", ODD)


@pytest.fixture
def run(tmp_path):
    """A run folder with a checkpoint, as far as readers of files look."""
    run = tmp_path / "run"
    (run / "checkpoints/00000004").mkdir(parents=True)
    shutil.copy(tiny_config(tmp_path / "corpus"), run / "config.yaml")
    (run / "events.jsonl").write_text(EVENT)
    row = '{"step": %d, "loss": 1.0, "tokens_seen": 9, "tokens_per_s": 1.0, "step_s": 1.0}\n'
    (run / "metrics.jsonl").write_text(row % 1 + row % 2)
    (run / "plan.txt").write_text("a plan\n")
    return run


def one_line(capfd):
    text = capfd.readouterr().err
    assert text.startswith("megascale: ") and text.count("\n") == 1, text
    return text


@odd
def test_readers_open_regular_files_only(tmp_path, make):
    path = tmp_path / "file"
    make(path)
    readers = [
        open_regular,
        read_json,
        read_yaml_text,
        lambda name: list(read_json_rows(name)),
        lambda name: read_whole(name, 9),
    ]
    for reader in readers:
        with pytest.raises(OSError) as caught:
            reader(path)
        assert caught.value.filename == str(path)
        assert caught.value.strerror == ODD[make] and file_problem(caught.value)
    for writer in (open_to_append, open_lock):
        with pytest.raises(OSError) as caught:
            writer(path)
        assert caught.value.filename == str(path)


def test_what_a_shell_hands_over_is_read(tmp_path):
    ours, theirs = os.pipe()
    os.write(theirs, b'{"a": 1}')
    os.close(theirs)
    assert read_json(f"/dev/fd/{ours}") == {"a": 1}
    os.close(ours)
    text = (tiny_config(tmp_path)).read_bytes()
    command = [sys.executable, "-m", "megascale", "plan", "/dev/stdin"]
    done = subprocess.run(command, input=text, capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == b"" and b"steps" in done.stdout


def test_what_is_read_whole_is_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_whole(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_whole(tmp_path / "a", 4)


def test_a_row_beyond_the_limit_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    long = b"x" * MOST_ROW_BYTES + b'{"step": 2}'  # its end looks like a row
    path.write_bytes(b'{"step": 1}\n' + long + b'\n{"step": 3}')
    assert [row["step"] for row in read_rows(path)] == [1, 3]


@odd
@pytest.mark.parametrize("verb", ["status", "report", "plot"])
@pytest.mark.parametrize("name", ["config.yaml", "events.jsonl", "metrics.jsonl", "plan.txt"])
def test_a_run_folder_with_odd_files(run, capfd, make, verb, name):
    make(run / name)
    words = ["--out", str(run / "out.html")] if verb == "report" else []
    status = main([verb, str(run), *words])
    needs = {
        "status": ("config.yaml", "events.jsonl", "metrics.jsonl"),
        "report": ("config.yaml", "events.jsonl", "metrics.jsonl", "plan.txt"),
        "plot": ("metrics.jsonl",),
    }
    is_missing = make is loop and verb != "plot" and name in ("metrics.jsonl", "plan.txt")
    if name in needs[verb] and not is_missing:
        assert status == 2
        line = one_line(capfd)
        assert ODD[make] in line and name in line
    else:
        assert status == 0


@odd
@pytest.mark.parametrize("name", ["train.idx", "train.bin"])
def test_a_corpus_with_odd_files(tmp_path, capfd, make, name):
    config = tiny_config(tmp_path)
    make(tmp_path / name)
    assert main(["plan", str(config)]) == 2
    assert str(tmp_path / ("train" if make is loop else name)) in one_line(capfd)


@odd
def test_a_config_that_is_no_file(tmp_path, capfd, make):
    make(tmp_path / "config.yaml")
    for verb in ("plan", "train", "prepare"):
        assert main([verb, str(tmp_path / "config.yaml")]) == 2
        assert ODD[make] in one_line(capfd)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root needs setpriv")
def test_what_may_not_be_read(run, tmp_path):
    """Verbs of runs, in one process that obeys permissions."""
    (tmp_path / "verbs.py").write_text(
        "import sys\nfrom megascale.cli import main\n"
        "for verb in ('status', 'report', 'plot', 'checkpoint list', 'checkpoint verify', "
        "'checkpoint prune --keep-last 1', 'lineage'):\n"
        "    print(main([*verb.split(), sys.argv[1]]))\n"
        "print(main(['train', sys.argv[2], 'run_dir=' + sys.argv[1] + '/new']))\n"
    )
    config = tiny_config(tmp_path / "corpus")
    run.chmod(0)
    try:
        done = subprocess.run(
            [
                *(WITHOUT_PRIVILEGE if os.geteuid() == 0 else []),
                *(sys.executable, tmp_path / "verbs.py", run, config),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    finally:
        run.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * 8
    lines = done.stderr.splitlines()
    assert len(lines) == 8 and all("ermission" in line for line in lines), done.stderr


def test_a_shard_that_may_not_be_opened_is_bad_input(tmp_path, capfd, monkeypatch):
    """As it may be where its size can be had."""
    config, honest = tiny_config(tmp_path), os.open

    def refusing(path, flags, *more, **options):
        if str(path).endswith("train.bin"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return honest(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert main(["plan", str(config)]) == 2
    assert "train.bin: Permission denied; it belongs beside" in one_line(capfd)


def test_errors_of_files_are_bad_input_and_others_are_not():
    with pytest.raises(RankError, match=r"^/x: Permission denied; give a path that this user may"):
        with plain_file_errors():
            raise PermissionError(errno.EACCES, "Permission denied", "/x")
    for error in (OSError(errno.EACCES, "no path"), OSError(errno.EBADF, "ours", "/x"), OSError()):
        with pytest.raises(OSError) as caught, plain_file_errors():
            raise error
        assert caught.value is error
    with pytest.raises(PermissionError), plain_file_errors(unless=lambda error: True):
        raise PermissionError(errno.EACCES, "Permission denied", "/x")


def test_an_error_of_a_file_on_rank_0_is_a_plain_line():
    error = error_from(error_bytes(PermissionError(errno.EACCES, "Permission denied", "/x/lock")))
    assert str(error).startswith("/x/lock: Permission denied; give a path")


def test_a_run_without_events_has_none(tmp_path):
    assert read_events(tmp_path) == []
