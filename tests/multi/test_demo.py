"""`megascale demo` on ranks of this machine, with a run of seconds."""

import json
import os
import statistics
import subprocess
import sys

import pytest
from tiny_corpus import tiny_config

from megascale import cli


def demo(folder, *words):
    """The finished process of `megascale demo WORDS` in `folder`."""
    command = [sys.executable, "-m", "megascale", "demo", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment())


def environment():
    here = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}


def test_planners_are_compared_on_the_same_batches(tmp_path):
    config = tiny_config(tmp_path / "run")
    done = demo(tmp_path, "--ranks", "2", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a rank holds 64 tokens and the context is 128" in done.stdout
    assert "losses: equal" in done.stdout and "calibrated in" in done.stdout
    assert (tmp_path / "runs/demo/demo.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "runs/demo/demo.json").read_text())
    assert [one["step"] for one in result["rounds"]] == [1, 2, 3, 4, 5]
    assert result["ranks"] == 2 and result["capacity_tokens"] == 64
    for one in result["rounds"]:
        assert max(one["lengths"]) <= 128 and sum(one["lengths"]) >= 1024
        planners = one["planners"]
        assert set(planners) == {"static", "static_best", "hybrid"}
        assert all(step["seconds"] > 0 and step["predicted_s"] > 0 for step in planners.values())
        losses = [step["loss"] for step in planners.values()]
        assert max(losses) / min(losses) - 1 < 1e-4
    first, last = (result["rounds"][turn]["planners"]["hybrid"]["loss"] for turn in (0, -1))
    assert last < first, "the models train"
    for name in ("static", "static_best"):
        each = [
            one["planners"][name]["seconds"] / one["planners"]["hybrid"]["seconds"]
            for one in result["rounds"]
        ]
        line = f"hybrid over {name}: {statistics.median(each):.2f}x (from {min(each):.2f}x to"
        assert (line in done.stdout) == (result["no_ratio"] is None)
        if result["no_ratio"] is None:
            assert result["ratios"][name]["median"] == pytest.approx(statistics.median(each))
    assert (result["ratios"] is None) == ("no ratio: " in done.stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "1"], "--ranks 1: one rank shares nothing"),
        (["--ranks", "two"], "--ranks must be a whole number from 1 to 1024, not 'two'"),
        (["--ranks", "2", "--config", "none.yaml"], "config none.yaml"),
        (["--ranks", "2", "--out", "file"], "--out file/demo.json"),
        (["--ranks", "2", "train.no_such=1"], "no_such"),
        (["--ranks", "2", "data.sources.tiny.path=none"], "source none"),
        (["--ranks", "2", "parallel.tensor=3"], "parallel.tensor"),
        (["--ranks", "2", "planner.cost=none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path / "run")
    (tmp_path / "file").write_text("of the user")
    monkeypatch.chdir(tmp_path)
    given = [] if "--config" in words else ["--config", str(config)]
    assert cli.main(["demo", *words, *given]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert (tmp_path / "file").read_text() == "of the user"


def test_other_files_are_not_replaced(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/demo.json").write_text('{"mine": 1}')
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--ranks", "2", "--config", str(config), "--out", "out"]) == 2
    assert "not a comparison of megascale demo" in capsys.readouterr().err
