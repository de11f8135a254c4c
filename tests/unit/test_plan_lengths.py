"""`megascale plan --lengths`: a public interface by which any planner can be judged."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megascale.commands.plan import add_plan_arguments, run_plan
from megascale.errors import UserError
from megascale.planner import PLANNERS, CostModel, StepPlan, step_s
from megascale.simulate.lengths import draw_lengths

COST = {
    "a": 5.128e-9,
    "b": 1.84e-4,
    "fixed": 0.01,
    "latency": 0.003,
    "transfer_intra": 16e-6,
    "transfer_inter": 50e-6,
    "node_size": 8,
}
FIELDS = {"num_ranks", "mode", "capacity", "predicted_s", "lower_bound_s", "plan_s", "rings"}


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    drawn = draw_lengths("github", None, 65_536, 0, 200)
    path.write_text("\n".join(map(str, drawn)) + "\n")
    return path


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    path = tmp_path / "COST.json"
    path.write_text(json.dumps(COST))
    return path


def plan(lengths: Path, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    return run_plan(parser.parse_args(["--lengths", str(lengths), *map(str, arguments)]))


def planned(lengths: Path, out: Path, *arguments: object) -> dict[str, Any]:
    assert plan(lengths, "--json", out, *arguments) == 0
    value: dict[str, Any] = json.loads(out.read_text())
    return value


@pytest.mark.parametrize("planner", [None, *PLANNERS])
@pytest.mark.parametrize("mode", ["free", "aligned", "lockstep"])
def test_the_json_is_a_valid_plan(
    lengths: Path, cost: Path, tmp_path: Path, planner: str | None, mode: str
) -> None:
    if planner == "longest_first":
        lengths.write_text("\n".join(str(n) for n in range(1, 300)))
    chosen = ["--planner", planner] if planner else []
    stages = ["--pp", 4] if mode == "aligned" else []
    given = ("--ranks", 16, "--capacity", 8192, "--mode", mode, "--cost", cost, "--budget-s", 0.2)
    value = planned(lengths, tmp_path / "plan.json", *given, *stages, *chosen)
    assert set(value) >= FIELDS
    assert set(value["rings"][0]) == {"id", "ranks", "sequences", "offload", "index"}
    tokens = np.loadtxt(lengths, dtype=np.int64)
    judged = StepPlan.from_json(value)
    judged.check(tokens)
    seconds = step_s(judged, tokens, CostModel.load(cost), 4 if stages else 1)
    assert value["predicted_s"] == pytest.approx(seconds)
    assert 0 < value["lower_bound_s"] <= value["predicted_s"]
    assert (value["num_ranks"], value["mode"], value["capacity"]) == (16, mode, 8192)


def test_says_what_it_planned(lengths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(lengths, "--ranks", 16, "--capacity", 8192) == 0
    text = capsys.readouterr().out
    tokens = np.loadtxt(lengths, dtype=np.int64)
    assert text.startswith(f"200 sequences of {tokens.sum():,} tokens on 16 ranks")
    assert "planned by            hybrid in" in text and "x the lower bound" in text
    assert "static CP" in text and text.count("rank ") >= 16


def test_gantt_is_drawn(lengths: Path, tmp_path: Path) -> None:
    png = tmp_path / "plan.png"
    plan(lengths, "--ranks", 16, "--capacity", 8192, "--gantt", png)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_equal_inputs_give_equal_plans(lengths: Path, cost: Path, tmp_path: Path) -> None:
    given = ("--ranks", 24, "--capacity", 8192, "--mode", "lockstep", "--cost", cost)
    first, second = (planned(lengths, tmp_path / f"{i}.json", *given) for i in "ab")
    assert first["rings"] == second["rings"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no length; write one integer a line"),
        ("\n\n", "holds no length"),
        ("5\nx\n", "line 2 is 'x', not a whole number of tokens from 1 to"),
        ("5\n0\n", "line 2 is '0'"),
        ("-3\n", "line 1 is '-3'"),
        ("1.5\n", "line 1 is '1.5'"),
        ("9" * 30, "line 1 is '999"),
        ("100000\n", "a sequence of 100000 tokens does not fit 4 ranks of 100 tokens"),
    ],
)
def test_bad_lengths_are_one_clear_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        plan(path, "--ranks", 4, "--capacity", 100)


def test_a_distribution_needs_a_config() -> None:
    with pytest.raises(UserError, match="--lengths web: a name goes with CONFIG; give a file"):
        plan("web", "--ranks", 4, "--capacity", 100)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--ranks", 4), "needs --capacity TOKENS too"),
        (("--capacity", 4), "needs --ranks N too"),
        (("--ranks", 0, "--capacity", 4), "--ranks must be at least 1, not 0"),
        (("--ranks", 4, "--capacity", -1), "--capacity must be a whole number"),
        (("--ranks", 4, "--capacity", 99999, "--pp", 2), "--pp 2: needs --mode aligned, or"),
        (
            ("--ranks", 4, "--capacity", 99999, "--pp", 0, "--mode", "aligned"),
            "--pp must be at least 1, not 0",
        ),
        (("--ranks", "1M", "--capacity", 4), "--ranks must be at most 131072, not 1M"),
        (
            ("--ranks", 4, "--capacity", 2**53),
            f"--capacity must be at most 1099511627776, not {2**53}",
        ),
        (("--ranks", 4, "--capacity", 99999, "--gantt", "x"), "--gantt x: must end in .png"),
        (("--ranks", 4, "--capacity", 99999, "--budget-s", "nan"), "--budget-s nan: must be"),
        (("--ranks", 4, "--capacity", 99999, "--cost", "no.json"), "cost file no.json"),
        (("--ranks", 4, "--capacity", 99999, "--json", "/no/x.json"), "--json /no/x.json"),
        (("--ranks", 4, "--capacity", 9, "run.yaml"), "--capacity goes with .* without CONFIG"),
        (("--ranks", 4, "--capacity", 9, "--device", "h100"), "--device goes with CONFIG"),
    ],
)
def test_bad_options_are_one_clear_line(
    lengths: Path, arguments: tuple[object, ...], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        plan(lengths, *arguments)


def test_options_of_lengths_without_lengths_are_an_error() -> None:
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    for arguments, problem in (
        (["run.yaml", "--capacity", "8"], "--capacity goes with --lengths FILE"),
        ([], "give CONFIG, or --lengths FILE"),
    ):
        with pytest.raises(UserError, match=problem):
            run_plan(parser.parse_args(arguments))


def test_missing_file_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megascale", "plan", "--lengths", str(tmp_path / "none")]
    command += ["--ranks", "2", "--capacity", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "No such file" in done.stderr
