"""The library as `import megascale` offers it."""

import doctest
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import megascale
from megascale import api
from megascale.config import schema
from megascale.errors import UserError
from megascale.planner import (
    PLANNERS,
    CostModel,
    OffloadModel,
    Problem,
    StepPlan,
    find_planner,
    plan_hybrid,
    plan_longest_first,
)

LENGTHS = [4000, 300, 200, 200, 900, 1000, 1500, 100]


def plan_whole(problem: Problem) -> StepPlan:
    """A planner of a user's own."""
    return plan_longest_first(problem)


def plan_nothing(problem):
    """A planner that forgets to return its plan."""


def plan_half(problem):
    """A planner that leaves sequences out."""
    return replace(plan_longest_first(problem), rings=())


def test_examples_of_the_docstrings_are_right():
    result = doctest.testmod(api)
    assert result.failed == 0 and result.attempted >= 7


@pytest.mark.parametrize("planner", ["hybrid", "static_best", "bytescale"])
def test_every_token_is_on_one_rank_once(planner):
    step = megascale.plan(LENGTHS, num_ranks=4, capacity_tokens=2048, planner=planner)
    seen = [np.zeros(n, int) for n in LENGTHS]
    for rank in range(4):
        for batch in step.micro_batches(rank):
            assert batch.ranks[batch.place] == rank and batch.num_tokens <= 2048
            expected = [
                position
                for index, ranges in zip(batch.sequences, batch.token_ranges)
                for start, stop in ranges
                for position in range(start, stop)
            ]
            assert batch.positions.tolist() == expected
            assert batch.cu_seqlens.tolist()[-1] == batch.num_tokens == len(expected)
            assert len(batch.cu_seqlens) == len(batch.sequences) + 1
            for index, ranges in zip(batch.sequences, batch.token_ranges):
                for start, stop in ranges:
                    seen[index][start:stop] += 1
    assert all((counts == 1).all() for counts in seen)


def test_a_plan_keeps_its_lengths_in_json_and_needs_them():
    step = megascale.plan(LENGTHS, num_ranks=4, capacity_tokens=2048)
    again = StepPlan.from_json(json.loads(json.dumps(step.to_json())))
    assert again == step and again.lengths == tuple(LENGTHS)
    bare = replace(step, lengths=())
    assert "lengths" not in bare.to_json()
    assert StepPlan.from_bytes(bare.to_bytes()) == bare
    with pytest.raises(ValueError, match="no lengths"):
        bare.micro_batches(0)
    with pytest.raises(ValueError, match="rank 4 of 4"):
        step.micro_batches(4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lengths": [1.5]}, "lengths must be whole numbers"),
        ({"lengths": [[1, 2]]}, "one for each sequence"),
        ({"lengths": [0]}, "a sequence has 0 tokens"),
        ({"lengths": [1 << 62]}, "a sequence has 4611686018427387904 tokens"),
        ({"lengths": [10**30]}, "lengths must be whole numbers"),
        ({"lengths": [[1], [2, 3]]}, "lengths must be whole numbers"),
        ({"lengths": [True]}, "lengths must be whole numbers"),
        ({"lengths": None}, "lengths must be whole numbers"),
        ({"lengths": [10_000]}, "does not fit 2 ranks"),
        *(
            ({name: value}, f"{name} = .* must be a whole number from 1")
            for name in ("num_ranks", "capacity_tokens", "pipeline")
            for value in (0, -1, 2.0, "2", None, True, 10**30)
        ),
        ({"mode": "lockstep", "pipeline": 10**9}, "pipeline = 1000000000 must be"),
        ({"mode": "fast"}, "'fast' must be one of free, aligned, lockstep"),
        ({"pipeline": 2}, "pipeline=2 needs mode aligned"),
        ({"planner": "hybird"}, "did you mean hybrid?"),
        ({"planner": "no_such_module:f"}, "ModuleNotFoundError"),
        ({"planner": "math:pi"}, "is no function"),
        ({"planner": None}, "planner = None must be a name"),
        ({"planner": plan_hybrid}, "planner = .* must be a name"),
        ({"planner": "test_api:plan_nothing"}, "returned NoneType; a planner returns"),
        ({"planner": "test_api:plan_half"}, "planner test_api:plan_half made no plan of these"),
        ({"cost": "nowhere.json"}, "No such file"),
        ({"cost": 3}, "cost = 3 must be the path"),
        ({"cost": CostModel(a=1e-9, b=math.nan)}, "b = nan must be a number from 0"),
        ({"cost": CostModel(a=-1, b=1)}, "a = -1 must be a number from 0"),
        ({"cost": CostModel(a=1e-9, b=1e-4, node_size=0)}, "node_size = 0 must be a whole number"),
        ({"slowdown": [1.0]}, "at least 1 for each of the 2 ranks"),
        ({"slowdown": [1, -1]}, "at least 1 for each of the 2 ranks"),
        ({"slowdown": None}, "slowdown None must have"),
        ({"slowdown": ["a"]}, "slowdown .'a'. must have"),
        ({"offload": 3}, "offload 3 is no OffloadModel"),
        ({"offload": OffloadModel(4, 1.0, 0.0)}, "copy_bytes_per_s = 0.0 must be"),
    ],
)
def test_bad_input_is_named(arguments, message):
    given = {"lengths": [100, 50], "num_ranks": 2, "capacity_tokens": 128, **arguments}
    with pytest.raises(UserError, match=message):
        megascale.plan(given.pop("lengths"), **given)


def test_planners_of_ones_own():
    assert find_planner("test_api:plan_whole") is plan_whole
    step = megascale.plan([5, 4, 3], num_ranks=2, capacity_tokens=8, planner="test_api:plan_whole")
    assert (
        step.rings
        == megascale.plan([5, 4, 3], num_ranks=2, capacity_tokens=8, planner="longest_first").rings
    )


def test_a_planner_in_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text("from megascale.planner import plan_longest_first as mine\n")
    (tmp_path / "lengths.txt").write_text("5\n4\n3\n")
    script = "import sys; from megascale.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["plan", "--lengths", "lengths.txt", "--ranks", "2", "--capacity", "8"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *words, "--planner", "mine:mine"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and "mine:mine" in done.stdout


def test_whole_numbers_of_any_type():
    numbers = np.array([5, 4, 3], np.uint64), np.int64(2), np.int32(8)
    lengths, num_ranks, capacity = numbers
    step = megascale.plan(lengths, num_ranks=num_ranks, capacity_tokens=capacity)
    assert step == megascale.plan([5, 4, 3], num_ranks=2, capacity_tokens=8)
    assert type(step).from_bytes(step.to_bytes()) == step
    assert len({batch for rank in (0, 1) for batch in step.micro_batches(rank)}) == 2


def test_what_is_offered_can_be_seen():
    assert set(megascale.__all__) <= set(dir(megascale))
    assert {"attend", "micro_batches"} <= set(dir(megascale.mesh))
    assert megascale.planner.Problem is Problem


@pytest.mark.parametrize("name", ["megascale.train", "megascale.mesh.attend"])
def test_what_needs_torch_says_how_to_install_it(name):
    script = f"""
import sys
class Missing:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import megascale
try:
    {name}("run.yaml")
except (ImportError, ValueError) as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "needs torch, not installed here: pip install" in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("call", [megascale.load_run, megascale.train])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None,), "config = None must be the path"),
        ((3,), "config = 3 must be the path"),
        (({"model": {}},), "must be the path of a file"),
        (("run.yaml", "train.tokens=20M"), "must be a list of texts"),
        (("run.yaml", [3]), "must be a list of texts"),
        (("run.yaml", None), "must be a list of texts"),
    ],
)
def test_no_config(call, arguments, message):
    with pytest.raises(UserError, match=message):
        call(*arguments)


@pytest.mark.parametrize("resume", ["now", 1.5, True, -1, "\N{SUPERSCRIPT TWO}"])
def test_no_step_to_resume(resume):
    with pytest.raises(UserError, match="give auto, latest or the number of a step"):
        megascale.train("run.yaml", resume=resume)


def test_configs_know_the_planners():
    assert set(schema.PLANNERS) == set(PLANNERS)


def test_costs_follow_the_shape():
    shape = {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "vocab_size": 1000}
    cost, deeper = megascale.model_cost(**shape), megascale.model_cost(**shape | {"num_layers": 8})
    assert deeper.a == pytest.approx(2 * cost.a) and cost.b < deeper.b < 2 * cost.b
    with pytest.raises(UserError, match="unknown key 'model.num_layer'"):
        megascale.model_cost(num_layer=4)
    for tensor in (0, -1, "2", 1.5, None, True):
        with pytest.raises(UserError, match="tensor = .* must be a whole number"):
            megascale.model_cost(**shape, tensor=tensor)


def test_metrics_are_flat_rows(tmp_path):
    rows = [{"step": 1, "loss": 2.5, "eval": {"web": {"loss": 3.0}}}, {"step": 2, "loss": 2.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{")
    assert megascale.read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.5, "eval/web/loss": 3.0},
        {"step": 2, "loss": 2.25},
    ]
    with pytest.raises(UserError, match="give the folder of a run"):
        megascale.read_metrics(tmp_path / "nowhere")
    with pytest.raises(UserError, match="run_dir = None must be the path"):
        megascale.read_metrics(None)


def test_plans_need_no_torch():
    script = """
import sys
sys.modules["torch"] = None
import megascale
print(len(megascale.plan([5, 4], num_ranks=2, capacity_tokens=8).rings))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr
