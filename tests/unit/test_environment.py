"""What torchrun says in the environment, and what is wrong with it, in one line."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny_corpus import tiny_config

from megascale.errors import RankError
from megascale.runtime.distributed import any_overlap
from megascale.runtime.environment import world_from_environment

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GOOD = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
GOOD |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_what_torchrun_says_is_taken(environment):
    environment(GOOD)
    assert world_from_environment() == (3, 4, 1)
    environment({})
    assert world_from_environment() == (0, 1, 0)
    environment({"RANK": "0", "WORLD_SIZE": "1"})  # one rank meets nobody
    assert world_from_environment() == (0, 1, 0)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(environment, name):
    environment({key: value for key, value in GOOD.items() if key != name})
    with pytest.raises(RankError, match=f"but {name} is not set; start it with .* --ranks N"):
        world_from_environment()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("MASTER_PORT", "99999", "MASTER_PORT = '99999' must be a whole number from 1 to 65535"),
        ("MASTER_PORT", "http", "MASTER_PORT = 'http' must be a whole number"),
        ("MASTER_PORT", "0", "from 1 to 65535"),
        ("RANK", "-1", "RANK = '-1' must be a whole number"),
        ("RANK", "4", "RANK = 4 must be below WORLD_SIZE = 4"),
        ("RANK", "9" * 30, "must be a whole number"),
        ("WORLD_SIZE", "", "WORLD_SIZE = '' must be a whole number from 1"),
        ("LOCAL_RANK", "x", "LOCAL_RANK = 'x' must be"),
        ("LOCAL_WORLD_SIZE", "5", "LOCAL_WORLD_SIZE = '5' must be a whole number from 1 to 4"),
    ],
)
def test_a_bad_variable_is_named(environment, name, value, message):
    environment({**GOOD, name: value})
    with pytest.raises(RankError, match=message):
        world_from_environment()


@pytest.mark.parametrize(
    "nodes, cores, shared",
    [
        ("aa", [[1, 1, 0, 0], [0, 0, 1, 1]], False),
        ("aa", [[1, 1, 1, 0], [0, 0, 1, 1]], True),
        ("ab", [[1, 1, 1, 1], [1, 1, 1, 1]], False),
        ("aba", [[1, 0], [1, 1], [0, 1]], False),
        ("abb", [[1, 0], [1, 1], [0, 1]], True),
    ],
)
def test_ranks_of_a_node_with_a_core_in_common_share_cores(nodes, cores, shared):
    assert any_overlap(list(nodes), np.array(cores, dtype=np.uint8)) == shared


def test_a_rank_says_it_in_one_line():
    """Also one that is not the first, which leaves the word to the first elsewhere."""
    unset = {key: value for key, value in os.environ.items() if key not in NAMES}
    command = [sys.executable, "-m", "megascale", "train", "configs/quickstart.yaml"]
    done = subprocess.run(command, env={**unset, "RANK": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("megascale: rank 1: RANK = 1 must be below WORLD_SIZE = 1; ")
    assert done.stderr.count("\n") == 1


def test_ranks_that_cannot_meet_end_with_one_line(tmp_path):
    config = tiny_config(tmp_path)
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        here = {**GOOD, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-m", "megascale", "train", str(config), f"run_dir={tmp_path}/r"],
            env={**clean, **here},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert done.returncode == 2 and "cannot meet the others at " in done.stderr
    assert f":{port}" in done.stderr and "Traceback" not in done.stderr
