"""`megascale train --ranks N`: what is wrong is found before ranks start, and how they start."""

import os
import shlex
from types import SimpleNamespace

import pytest
import torch
from tiny_corpus import tiny_config

from megascale.cli import main
from megascale.commands import calibrate as calibrate_command
from megascale.commands import train as command
from megascale.launch.local_ranks import LocalRanks, RankJob, as_rank, rank_count
from megascale.run import preflight as ready
from megascale.runtime.logs import STARTER_VARIABLE
from megascale.runtime.placement import node_name


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for module in (command, calibrate_command):
        monkeypatch.setattr(module, "run_ranks", lambda *_: pytest.fail("ranks are started"))
    return str(tiny_config(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "link, run_dir, said",
    [
        ("nowhere", "link", "link is a link to nowhere, which is not there"),
        ("nowhere", "link/run", "link is a link to nowhere, which is not there"),
        ("link", "link", "link is a link that leads back to itself"),
        ("file", "link", "link is there, and no folder"),
    ],
)
def test_a_run_dir_that_cannot_be_is_named(config, capsys, tmp_path, ranks, link, run_dir, said):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(link)
    assert main(["train", config, f"run_dir={run_dir}", f"--ranks={ranks}"]) == 2
    line = capsys.readouterr().err
    assert line == f"megascale: run_dir {run_dir}: {said}; mend it or set another run_dir\n"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("verb", ["train", "calibrate"])
@pytest.mark.parametrize(
    "words, message",
    [
        (["--ranks=0"], "--ranks must be at least 1"),
        (["--ranks=two"], "--ranks must be a whole number"),
        (["--ranks=5000"], "--ranks must be at most 1024"),
        (["--ranks=3", "parallel.tensor=2"], "must divide the 3 ranks started"),
        (["--ranks=2", "modle.num_layers=3"], "did you mean 'model'"),
        (["--ranks=2", "device=cuda"], "device = cuda, but torch sees no CUDA device"),
    ],
)
def test_bad_input_is_one_line(config, capsys, monkeypatch, verb, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([verb, config, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_more_ranks_than_memory_holds_are_refused(config, capsys, monkeypatch):
    gigabyte = SimpleNamespace(available=10**9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: gigabyte)
    assert rank_count("3") == 3
    for words in (["train", "--ranks=4"], ["launch", "--ranks-per-node=4"]):
        assert main([words[0], config, *words[1:]]) == 2
        said = capsys.readouterr().err
        assert "1.0 GB are free here; at most 3 ranks fit" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.sources.tiny.path=nowhere"], "no corpus there"),
        (["model.vocab_size=200"], "model.vocab_size = 200 is below"),
        (["planner.cost=nowhere.json"], "nowhere.json"),
        (["--resume=now"], "resume now: give auto, latest"),
    ],
)
def test_a_run_that_cannot_be_leaves_nothing_behind(config, capsys, words, message):
    assert main(["train", config, "--ranks=2", *words, "run_dir=run"]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not os.path.exists("run")


@pytest.mark.parametrize("ranks", [[], ["--ranks=2"]])
@pytest.mark.parametrize("kind, problem", [("file", "Not a directory"), ("link", "symbolic link")])
def test_a_bad_folder_of_emergency_copies_is_found_first(
    config, capsys, monkeypatch, tmp_path, kind, problem, ranks
):
    monkeypatch.setattr(command, "run_ranks", lambda job, asked: pytest.fail("ranks start"))
    copies = tmp_path / "copies"
    if kind == "file":
        copies.touch()
    else:
        copies.mkdir()
        (copies / node_name()).symlink_to(tmp_path)
    words = [f"checkpoint.emergency_dir={copies}", "run_dir=run"]
    assert main(["train", config, *ranks, *words]) == 2
    said = capsys.readouterr().err
    assert f"checkpoint.emergency_dir: node {node_name()}: " in said and problem in said
    assert said.count("\n") == 1 and not os.path.exists("run")


def test_a_folder_that_holds_a_run_is_refused(config, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    assert main(["train", config, "--ranks=2", "run_dir=run"]) == 2
    assert "run_dir run already holds a run; continue it with --resume" in capsys.readouterr().err


def test_branch_finds_its_parent_first(config, capsys):
    assert main(["branch", "nowhere", config, "--ranks=2", "run_dir=run"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("count, fits", [(4, True), (5, False)])
def test_a_rank_takes_a_device(config, capsys, monkeypatch, count, fits):
    monkeypatch.setattr(ready, "GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    started = []
    monkeypatch.setattr(command, "run_ranks", lambda job, asked: started.append(job) or 0)
    assert main(["train", config, f"--ranks={count}", "run_dir=run"]) == (0 if fits else 2)
    said = capsys.readouterr().err
    assert bool(started) == fits
    assert fits or (
        "--ranks 5: this machine has 4 CUDA device(s)" in said and "give --ranks 4" in said
    )


def test_ranks_under_torchrun_are_refused(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", config, "--ranks=2"]) == 2
    monkeypatch.setenv("RANK", "1")
    assert rank_count(None) == 1
    assert "--ranks 2: torchrun has started ranks already" in capsys.readouterr().err


def test_ranks_do_what_was_asked(config, monkeypatch):
    jobs = []
    for module in (command, calibrate_command):
        monkeypatch.setattr(module, "run_ranks", lambda job, asked: jobs.append(job) or 0)
    seen = []
    monkeypatch.setattr(calibrate_command, "as_rank", lambda work: seen.append(work.args[0]) or 0)
    words = ["--lengths=64,128", "--repeats=2", "--fastest", "--minutes=0.5", "--plot=a b.png"]
    assert main(["calibrate", config, "seed=7", *words, "--ranks=2"]) == 0
    assert main(list(jobs[0].command[3:])) == 0
    assert main(["calibrate", config, "seed=7", *words]) == 0
    assert vars(seen[0]) == vars(seen[1])
    assert jobs[0].advice.endswith("--ranks 2") and "'--plot=a b.png'" in jobs[0].advice
    assert main(["train", config, "run_dir=run x", "--ranks=3", "--resume=auto"]) == 0
    rank = ("megascale", "train", config, "run_dir=run x", "--resume", "auto")
    assert jobs[1].command[2:] == rank and str(jobs[1].run_dir) == "run x"
    again = "megascale train", "'run_dir=run x' --ranks 3 --resume auto"
    assert jobs[1].advice == f"go on with: {again[0]} {shlex.quote(config)} {again[1]}"


@pytest.mark.parametrize(
    "world, local, said",
    [
        (None, None, "megascale train c.yaml --resume auto"),
        ("2", "2", "megascale train c.yaml --ranks 2 --resume auto"),
        (
            "8",
            "4",
            "torchrun --nnodes 2 --nproc-per-node 4 -m megascale train c.yaml --resume auto",
        ),
    ],
)
def test_the_command_that_goes_on(config, monkeypatch, world, local, said):
    if world is not None:
        names = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local, "RANK": "1", "LOCAL_RANK": "1"}
        for name, value in (names | {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}).items():
            monkeypatch.setenv(name, value)
    assert command.resume_command("c.yaml", []) == said


@pytest.mark.parametrize("given, count, threads", [(None, 3, "2"), (None, 9, "1"), ("5", 2, "5")])
def test_ranks_share_the_cores(tmp_path, monkeypatch, given, count, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    ranks = LocalRanks(RankJob((), count, tmp_path, ""), tmp_path, SimpleNamespace())
    environment = ranks._environment(1, 29500)
    assert environment["OMP_NUM_THREADS"] == threads and environment["LOCAL_RANK"] == "1"
    assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == str(count)


def test_a_process_that_nobody_has_started_only_works(config, monkeypatch):
    monkeypatch.setenv(STARTER_VARIABLE, "1")  # inherited from somewhere: no rank without a file
    assert as_rank(lambda: 7) == 7
