"""`megascale train --ranks N` owns the end of its ranks, however it comes."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from crash_drill import curve
from tiny_corpus import rows, tiny_config

from megascale.monitor.metrics import METRICS_FILE

ROOT = Path(__file__).parents[2]
LONG = ("train.tokens=100M", "eval.every_steps=0", "checkpoint.save_every_steps=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


class Started:
    """A process with its output in files; it and all below it end with the block."""

    def __init__(self, folder, *command, **more):
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        self.folder = folder
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            streams = {"stdout": out, "stderr": err} | more
            self.process = subprocess.Popen(
                [str(word) for word in command],
                env=environment | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
                **streams,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in [*self.below(), self.process]:
            process.kill()
        self.process.wait()

    def below(self):
        """All processes that it has started."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, done, timeout_s=240):
        """Until `done()`, while the process runs."""
        deadline = time.monotonic() + timeout_s
        while not done():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def finish(self, timeout_s=240):
        """(exit status, lines on stderr); nothing that it started is left."""
        below = self.below()
        status = self.process.wait(timeout_s)
        assert not psutil.wait_procs(below, timeout=10)[1], self.said()
        return status, self.err.read_text().splitlines()

    def said(self):
        return self.out.read_text() + self.err.read_text()


def rank_of(started, number):
    """The process that is a rank."""
    [rank] = [
        process
        for process in psutil.Process(started.process.pid).children()
        if process.environ().get("RANK") == str(number)
    ]
    return rank


def train(folder, config, run_dir, *words, **more):
    command = (sys.executable, "-m", "megascale", "train", config, f"run_dir={run_dir}", *LONG)
    return Started(folder, *command, "--ranks", "2", *words, **more)


def steps(run_dir):
    path = run_dir / METRICS_FILE
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(config, tmp_path):
    run = tmp_path / "run"
    with train(tmp_path, config, run) as started:
        started.wait_for(lambda: steps(run) >= 3)
        rank_of(started, 1).kill()
        status, [line] = started.finish()
    assert status == 1
    again = shlex.join(["megascale", "train", str(config), f"run_dir={run}", *LONG])
    said = "rank 1 was killed by SIGKILL, by a person or for want of memory"
    assert line == f"megascale: {said}; go on with: {again} --ranks 2 --resume auto"
    last = rows(run / "events.jsonl")[-1]
    assert (last["event"], last["error"], last["rank"]) == ("error", "killed by SIGKILL", 1)
    assert last["step"] >= 3 and not last["starting"]
    assert "Traceback" in (run / "logs/rank0.log").read_text()  # it lost its peer


@pytest.mark.slow
def test_ctrl_c_saves_and_stops(config, tmp_path):
    run = tmp_path / "run"
    with train(tmp_path, config, run) as started:
        started.wait_for(lambda: steps(run) >= 2)
        started.process.send_signal(signal.SIGINT)
        assert started.finish() == (0, [])
        assert "--ranks 2 --resume auto" in started.out.read_text().splitlines()[-1]
    assert max(curve(run)) == int((run / "checkpoints/latest").read_text()) >= 2


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops(config, tmp_path):
    """Nothing can be written there then."""
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    heeded = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also if the tests have nohup
    with train(tmp_path, config, run, **streams, preexec_fn=heeded) as started:
        os.close(theirs)
        started.wait_for(lambda: steps(run) >= 2)
        os.close(ours)
        started.process.send_signal(signal.SIGHUP)
        assert started.finish()[0] == 0
    assert max(curve(run)) == int((run / "checkpoints/latest").read_text()) >= 2
    assert rows(run / "events.jsonl")[-1]["asked"]


RANK = """
import os, signal, sys, threading
from functools import partial
from pathlib import Path
from megascale.errors import RankError, UserError
from megascale.launch.local_ranks import as_rank
from megascale.runtime.signals import TWIN_S, StopRequest
from megascale.cli import _complain

folder, how, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]

def work():
    import time
    stop = None if how == "starts" else StopRequest(echo_s=TWIN_S)
    (folder / f"ready-{rank}").touch()
    while not (folder / "go").exists():
        if how == "stubborn" or stop is None or not stop:
            time.sleep(0.01)
        else:
            return 0
    if how == "mistake":
        raise UserError("nothing works")
    if how == "own" and rank == "1":
        raise RankError("document 7 is odd")
    if rank == "0":
        raise RuntimeError("Connection closed by peer")
    while not (folder / "later").exists():
        time.sleep(0.01)
    raise MemoryError("no room\\nat all")

try:
    sys.exit(as_rank(work))
except UserError as error:
    sys.exit(_complain(error))
"""
STARTER = """
import sys
from functools import partial
from pathlib import Path
from megascale.launch.local_ranks import RankJob, run_ranks
from megascale.runtime.signals import TWIN_S, StopRequest
folder = Path(sys.argv[1])
command = (sys.executable, str(folder / "rank.py"), str(folder), sys.argv[2])
count = int(sys.argv[3]) if len(sys.argv) > 3 else 2
asked = StopRequest(echo_s=TWIN_S)
print("begins", flush=True)
sys.exit(run_ranks(RankJob(command, count, folder / "logs", "go on with: x"), asked))
"""


@pytest.fixture
def start(tmp_path):
    """`start(how)`: small ranks that have begun to work, and end as told."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "starter.py").write_text(STARTER)
    running = []

    def begin(how):
        started = Started(tmp_path, sys.executable, tmp_path / "starter.py", tmp_path, how)
        running.append(started)
        started.wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
        return started

    yield begin
    for started in running:
        started.__exit__()


@pytest.mark.parametrize(
    "how, status, line",
    [
        ("mistake", 2, "megascale: nothing works"),
        ("own", 2, "megascale: rank 1: document 7 is odd"),
    ],
)
def test_bad_input_of_ranks_is_one_line(start, tmp_path, how, status, line):
    started = start(how)
    (tmp_path / "go").touch()
    assert started.finish() == (status, [line])
    assert started.out.read_text() == "begins\n" and not (tmp_path / "logs").exists()


def test_an_error_is_one_line_and_its_traceback_is_in_the_log(start, tmp_path):
    """Of the rank that failed, although another noticed before that its peer was gone."""
    started = start("fault")
    first = rank_of(started, 0)
    (tmp_path / "go").touch()
    started.wait_for(lambda: not first.is_running())  # and its end has been seen
    (tmp_path / "later").touch()
    log = tmp_path / "logs/rank1.log"
    line = f"megascale: rank 1: MemoryError: no room; see {log}; go on with: x"
    assert started.finish() == (1, [line]) and started.out.read_text() == "begins\n"
    text = log.read_text()
    assert text.count("Traceback") == 1 and text.rstrip().endswith("no room\nat all")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_ranks_start_ends_them(start, name):
    started = start("starts")
    started.process.send_signal(signal.Signals[name])
    line = f"megascale: stopped by {name}; there was nothing to save"
    assert started.finish() == (0, [line])


@pytest.mark.parametrize("ignores, status", [(False, 0), (True, 130)])
def test_signals_while_many_ranks_start_are_heeded(tmp_path, ignores, status):
    """The first lets them end; where they do not heed it, the second ends them."""
    heeds = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ignores else ""
    (tmp_path / "rank.py").write_text(f"import signal, time; {heeds}time.sleep(300)")
    (tmp_path / "starter.py").write_text(STARTER)
    command = (sys.executable, tmp_path / "starter.py", tmp_path, "-", 40)
    with Started(tmp_path, *command) as started:
        started.wait_for(lambda: "begins" in started.out.read_text())
        time.sleep(0.8)
        began = time.monotonic()
        started.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        if ignores:
            started.process.send_signal(signal.SIGINT)
        assert started.finish(60)[0] == status, started.said()
        assert time.monotonic() - began < 15  # to import torch beside 40 ranks took longer


def test_the_store_of_ranks_that_ends_is_said(start):
    started = start("stubborn")
    [store] = [
        process
        for process in psutil.Process(started.process.pid).children()
        if "megascale.launch.meeting" in process.cmdline()
    ]
    store.kill()
    line = "megascale: the store on which ranks meet has ended: it was killed; go on with: x"
    assert started.finish() == (1, [line])


def test_a_second_signal_ends_ranks_that_do_not_stop(start):
    started = start("stubborn")
    rank = rank_of(started, 1)
    os.kill(rank.pid, signal.SIGSTOP)  # not even the second one is heard there
    started.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while started.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)  # those within 0.2 s of the first are echoes
        started.process.send_signal(signal.SIGINT)
    line = "megascale: stopped at once by a second signal; go on with: x"
    assert started.finish() == (130, [line])


def test_ranks_die_with_the_process_that_started_them(start):
    started = start("stubborn")
    ranks = [rank_of(started, 0), rank_of(started, 1)]
    started.process.kill()
    assert not psutil.wait_procs(ranks, timeout=10)[1]
