"""Ranks that cannot make up a world say so in one line."""

import os
import socket
import subprocess
import sys

import pytest
from tiny_corpus import tiny_config

from megascale.errors import RankError
from megascale.runtime.environment import world_from_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
WHOLE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def given(monkeypatch):
    def given(environment):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return given


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1, 0)),
        (WHOLE, (1, 2, 1)),
        ({"RANK": "0"}, (0, 1, 0)),
        ({**WHOLE, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}, (0, 1, 1)),
    ],
)
def test_worlds(given, environment, expected):
    given(environment)
    assert world_from_environment() == expected


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_what_is_missing_is_named(given, name):
    given({key: value for key, value in WHOLE.items() if key != name})
    with pytest.raises(RankError, match=f"WORLD_SIZE = 2 without {name}; start ranks with"):
        world_from_environment()


@pytest.mark.parametrize(
    "name, value, problem",
    [("MASTER_PORT", value, "MASTER_PORT = ") for value in ("0", "65536", "x", "-1", "1e3")]
    + [("RANK", value, "RANK = ") for value in ("2", "-1", "one", "0x1", "9" * 5000)]
    + [("WORLD_SIZE", value, "WORLD_SIZE = ") for value in ("0", "1", "two", "\u0663")]
    + [("LOCAL_RANK", "left", "LOCAL_RANK = ")],
)
def test_what_is_wrong_is_named(given, name, value, problem):
    given({**WHOLE, name: value})
    with pytest.raises(RankError, match=problem):
        world_from_environment()


def test_ranks_that_cannot_meet_end_with_one_line(tmp_path):
    config = tiny_config(tmp_path)
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = {**WHOLE, "RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}
        for environment, problem in (
            ({"RANK": "1", "WORLD_SIZE": "2"}, "megascale: rank 1: WORLD_SIZE = 2 without"),
            (here, f"cannot meet the others at 127.0.0.1:{here['MASTER_PORT']}"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "megascale", "train", str(config), f"run_dir={tmp_path}/r"],
                env={**clean, **environment},
                capture_output=True,
                text=True,
                timeout=250,
            )
            assert done.returncode == 2 and problem in done.stderr
            assert "Traceback" not in done.stderr
