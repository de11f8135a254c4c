"""`megascale launch`: what it refuses, and what torchrun is told."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from drive import free_port
from tiny_corpus import tiny_config

from megascale.cli import main
from megascale.errors import UserError
from megascale.launch import job
from megascale.launch.driver import Node
from megascale.launch.failures import Cause, FailureBook
from megascale.monitor.events import read_events
from megascale.run import folder
from megascale.runtime import lock


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return str(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rendezvous=node1"], "write it as HOST:PORT"),
        (["--rendezvous=node1:http"], "write it as HOST:PORT"),
        (["--rendezvous=node1:70000"], "write it as HOST:PORT"),
        (["--num-nodes=2"], "--rendezvous is missing"),
        (["--num-nodes=2", "--node=2"], "nodes are numbered from 0 to 1"),
        (["--node=one"], "--node must be a whole number"),
        (["--nodes=2-3"], "--nodes 2-3: the job has 1"),
        (["--nodes=3-2"], "write 8, or 6-8"),
        (["--ranks-per-node=0"], "--ranks-per-node must be at least 1"),
        (["--leave-s=-1"], "times are 0 seconds or more"),
        (["--hang-s=nan"], "argument --hang-s: nan is no finite number"),
        (["--hang-s=2"], "--hang-s 2: give 5 or more, or 0"),
        (["--lost-s=1"], "nodes speak every 1 s; give 3"),
        (["parallel.tensor=2"], "must divide the 1 ranks started"),
        (["modle.num_layers=3"], "did you mean 'model'"),
        (["--rendezvous=192.0.2.1:29500"], "give an address of node 0"),
        (["run_dir=config.yaml/x"], "Not a directory; choose a folder you own"),
        (["data.sources.tiny.path=nowhere"], "nowhere"),
        (["data.sources.tiny.vocab_size=300", "model.vocab_size=257"], "model.vocab_size = 257"),
        (["planner.cost=nowhere.json"], "nowhere.json"),
        (["start.checkpoint=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(config, capsys, words, message):
    assert main(["launch", config, "--ranks-per-node=1", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not Path("runs").exists()


def test_a_shard_that_is_cut_short_is_found_before_ranks_start(config, capsys, tmp_path):
    index = tmp_path / "train.idx"
    index.write_bytes(index.read_bytes()[:-8])
    assert main(["launch", config, "--ranks-per-node=1", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "train.idx: has " in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "token, message",
    [("a" * 64, "no driver of node 0 answers there within 0.2 s"), (None, "/.token-9 after 0.2 s")],
)
def test_a_node_that_nobody_leads_gives_up(config, capsys, monkeypatch, token, message):
    if token is not None:
        monkeypatch.setenv("MEGASCALE_TOKEN", token)
    words = ["--node=1", "--num-nodes=2", "--rendezvous=127.0.0.1:9", "--join-s=0.2"]
    assert main(["launch", config, "--ranks-per-node=1", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_becomes_of_a_job_is_for_node_0_to_say(config, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = ["--num-nodes=2", "--rendezvous=127.0.0.1:9", "--join-s=0.2", "--ranks-per-node=1"]
    assert main(["launch", config, "--node=1", *words]) == 0
    assert "node 1 takes no part: --rendezvous 127.0.0.1:9: no " in capsys.readouterr().err
    assert main(["launch", "nowhere.yaml", "--node=1", *words]) == 0
    assert main(["launch", "nowhere.yaml", "--node=0", *words]) == 2


def test_nobody_joins_a_run_that_was_given_up(config, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    book = FailureBook([str(tmp_path / "run")], "7")
    assert [book.failed(Cause("boom", 0.0)) for _ in range(3)][2] is not None
    monkeypatch.setattr(job, "serve_board", lambda *_: pytest.fail("somebody may join"))
    words = ["--num-nodes=2", f"--rendezvous=127.0.0.1:{free_port()}", "--ranks-per-node=1"]
    assert main(["launch", config, *words, f"run_dir={tmp_path / 'run'}"]) == 3
    assert "given up: 3 times the same failure" in capsys.readouterr().out


def test_ranks_wait_for_what_a_lost_node_held(tmp_path, monkeypatch):
    held = folder._enter(tmp_path / "run", None)
    with pytest.raises(UserError, match="is in use by another run"):
        folder._enter(tmp_path / "run", "auto")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "attempt-0")
    monkeypatch.setattr(lock.time, "sleep", lambda _: held.close())
    folder._enter(tmp_path / "run", "auto").close()


def test_where_files_cannot_be_locked_nobody_is_said_to_hold_them(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(UserError, match="cannot be locked .No locks available.; choose a folder"):
        folder._enter(tmp_path / "run", None)
    with job._only_job(tmp_path / "run"):  # ranks will refuse it, and say why
        pass


def test_slurm_numbers_the_nodes(config, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_NODEID", "5")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "4")
    assert main(["launch", config, "--ranks-per-node=1"]) == 2
    assert "--node 5: nodes are numbered from 0 to 3" in capsys.readouterr().err


def test_every_attempt_is_a_rendezvous_of_its_own():
    node = Node(1, "n1", "n0", 8, True, "runs/x", None, ("train", "x.yaml", "a=$(b)"))
    words = node.torchrun(3, 6, 29500)
    assert words[-4:] == ["megascale", "train", "x.yaml", "a=$(b)"]
    expected = {
        "--nnodes=6",
        "--nproc-per-node=8",
        "--rdzv-id=attempt-3",
        "--rdzv-endpoint=n0:29500",
    }
    assert expected <= set(words) and not any("local-addr" in word for word in words)
    local = Node(0, "n0", "127.0.0.1", 1, True, "r", None, ()).torchrun(0, 1, 1)
    assert "--local-addr=127.0.0.1" in local


def test_one_job_drives_a_run(config, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    words = ["launch", config, "--ranks-per-node=1", f"run_dir={tmp_path / 'run'}"]
    with job._only_job(tmp_path / "run"):
        assert main(words) == 2
    said = capsys.readouterr().err
    assert f"is driven by another job (process {os.getpid()} on " in said and said.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".job"]  # no diary


def test_the_token_of_a_job_that_holds_the_port_stays(config, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        token = tmp_path / "run" / f".token-{port}"
        token.parent.mkdir()
        token.write_text("mine")
        words = [f"--rendezvous=127.0.0.1:{port}", f"run_dir={tmp_path / 'run'}", "--num-nodes=2"]
        assert main(["launch", config, "--ranks-per-node=1", *words]) == 2
    assert "Address already in use" in capsys.readouterr().err and token.read_text() == "mine"
    assert [event["event"] for event in read_events(tmp_path / "run")] == ["launch", "leave"]


FULL_DISK = """
import errno, sys
from megascale.cli import main
from megascale.monitor.lines import LineFile
from megascale.launch import failures

def full(lines):
    raise OSError(errno.ENOSPC, "No space left on device")

LineFile._catch_up, failures.DIARY_S = full, 0.0
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_whose_failures_cannot_be_counted_is_given_up(config, tmp_path):
    """Else Slurm would requeue it for ever. In a process of its own: a driver ends all below it."""
    words = [
        "launch",
        config,
        "--check=exit 1",
        "--ranks-per-node=1",
        f"run_dir={tmp_path / 'run'}",
    ]
    command = [sys.executable, "-c", FULL_DISK, *words]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 3, done.stderr
    assert "given up: " in done.stdout
    assert "cannot be written, so failures cannot be counted" in done.stdout
