"""The library as `import megascale` offers it."""

import doctest
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import megascale
from megascale import api
from megascale.config import schema
from megascale.errors import UserError
from megascale.planner import PLANNERS, Problem, StepPlan, find_planner, plan_longest_first

LENGTHS = [4000, 300, 200, 200, 900, 1000, 1500, 100]


def plan_whole(problem: Problem) -> StepPlan:
    """A planner of a user's own."""
    return plan_longest_first(problem)


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
        ({"lengths": [0]}, "at least 1"),
        ({"lengths": [10_000]}, "does not fit 2 ranks"),
        ({"num_ranks": 0}, "0 ranks"),
        ({"mode": "fast"}, "'fast' must be one of free, aligned, lockstep"),
        ({"pipeline": 2}, "pipeline=2 needs mode aligned"),
        ({"planner": "hybird"}, "did you mean hybrid?"),
        ({"planner": "no_such_module:f"}, "ModuleNotFoundError"),
        ({"planner": "math:pi"}, "is no function"),
        ({"cost": "nowhere.json"}, "No such file"),
        ({"slowdown": [1.0]}, "slowdowns of 1 ranks"),
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


def test_configs_know_the_planners():
    assert set(schema.PLANNERS) == set(PLANNERS)


def test_costs_follow_the_shape():
    shape = {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "vocab_size": 1000}
    cost, deeper = megascale.model_cost(**shape), megascale.model_cost(**shape | {"num_layers": 8})
    assert deeper.a == pytest.approx(2 * cost.a) and cost.b < deeper.b < 2 * cost.b
    with pytest.raises(UserError, match="unknown key 'model.num_layer'"):
        megascale.model_cost(num_layer=4)


def test_metrics_are_flat_rows(tmp_path):
    rows = [{"step": 1, "loss": 2.5, "eval": {"web": {"loss": 3.0}}}, {"step": 2, "loss": 2.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{")
    assert megascale.read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.5, "eval/web/loss": 3.0},
        {"step": 2, "loss": 2.25},
    ]
    with pytest.raises(UserError, match="give the folder of a run"):
        megascale.read_metrics(tmp_path / "nowhere")


def test_plans_need_no_torch():
    script = """
import sys
sys.modules["torch"] = None
import megascale
print(len(megascale.plan([5, 4], num_ranks=2, capacity_tokens=8).rings))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr
