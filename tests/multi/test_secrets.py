"""What the environment holds stays there: no token is in anything that a run writes or says."""

import os
from pathlib import Path

import pytest
from test_train import command
from tiny_corpus import tiny_config

SECRET = "s3cr3t-0f-th1s-us3r"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_KEY")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


def command_with_secrets(*words):
    """`command`, with tokens in the environment; an error that nobody expects is its answer too."""
    os.environ.update(dict.fromkeys(NAMES, SECRET))
    try:
        return command(*words)
    except ZeroDivisionError as error:
        return 1, repr(error)
    finally:
        for name in NAMES:
            del os.environ[name]


def command_that_breaks(*words):
    """`command_with_secrets`, of which the fifth step raises, with its locals at hand."""
    from megascale.training import loop

    honest, calls = loop.train_step, []

    def step(*args, **kwargs):
        calls.append(1)
        everything = dict(os.environ)
        return honest(*args, **kwargs) if len(calls) < 5 else everything[1 // 0]

    loop.train_step = step
    try:
        return command_with_secrets(*words)
    finally:
        loop.train_step = honest


def files_with_secrets(*folders):
    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    assert len(paths) > 8
    return [path for path in paths if SECRET.encode() in path.read_bytes()]


def test_no_secret_is_saved_or_said(ranks, config, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    words = ("train", config, f"run_dir={run}", "train.tokens=6000", "eval.every_steps=0")
    words += (f"checkpoint.emergency_dir={disk}", "checkpoint.emergency_every_steps=2")
    words += ("--resume", "auto")
    broken = ranks(2, command_that_breaks, *words)
    assert [status for status, _ in broken] == [1, 1]
    assert "ZeroDivisionError" in (run / "logs/rank1.log").read_text()
    assert files_with_secrets(run, disk) == []
    done = ranks(2, command_with_secrets, *words)
    assert [status for status, _ in done] == [0, 0], done
    report = ranks(1, command_with_secrets, "report", run)
    script = ranks(1, command_with_secrets, "submit", config, "--nodes=2", "--dry-run")
    assert report[0][0] == script[0][0] == 0, (report, script)
    assert "srun" in script[0][1] and list(run.glob("*.html"))
    assert files_with_secrets(run, disk) == []
    assert SECRET not in str([broken, done, report, script])
