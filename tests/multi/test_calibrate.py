"""Calibration through the real model on real ranks, and what plans make of it."""

import json
import os

import pytest

from megascale.config import Layout, finalize, parse_config
from megascale.planner import CostModel
from megascale.run.step_problem import cost_model, plan_lengths

CONFIG = """
run_dir: run
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64,
  vocab_size: 101}
data: {sources: {none: {path: none}}, context_tokens: 512}
planner: {capacity_tokens: 256}
train: {precision: fp32, tokens: 10000, threads: 1}
"""
QUICK = ["--minutes", "0.05", "--repeats", "2"]


def calibrated(folder, words, one_rank_a_node=False):
    """The exit status of `megascale calibrate` on this rank."""
    from megascale import cli

    os.environ["LOCAL_WORLD_SIZE"] = "1" if one_rank_a_node else os.environ["WORLD_SIZE"]
    out = os.path.join(folder, "COST.json")
    return cli.main(["calibrate", os.path.join(folder, "run.yaml"), "--out", out, *words])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def report_of(folder):
    return json.loads((folder / "COST.report.json").read_text())


def test_two_ranks_measure_a_cost_model_that_plans_use(ranks, folder):
    plot = folder / "fit.png"
    assert ranks(2, calibrated, str(folder), [*QUICK, "--plot", str(plot)]) == [0, 0]
    cost = CostModel.load(folder / "COST.json")
    assert cost.ring_s([256], [0]) > 0 and cost.calibrated and cost.node_size == 2
    assert cost.transfer_inter == cost.transfer_intra and cost.pass_inter == cost.pass_intra
    assert plot.stat().st_size > 10_000
    report = report_of(folder)
    assert 0 < report["seconds"] < 20
    assert report["machine"]["ranks"] == 2 and report["machine"]["threads_per_rank"] == 1
    assert {one["size"] for one in report["measurements"]} == {1, 2}
    assert max(max(one["lengths"], default=0) for one in report["measurements"]) == 512
    for one in report["measurements"]:
        assert sum(one["lengths"]) <= 256 * one["size"] and one["one_node"]
        whole = 3 - one["size"]
        assert len(one["seconds"]) in (whole, 2 * whole) and min(one["seconds"]) > 0
    overrides = [f"planner.cost={folder / 'COST.json'}", "planner.name=static"]
    config = finalize(parse_config(CONFIG, overrides), {"none": 10000}, 101)
    assert cost_model(config) == cost
    plan = plan_lengths(config, Layout.of(config, 2), [200])
    assert plan.predicted_s == pytest.approx(cost.ring_s([200], plan.rings[0].ranks))


def test_rings_across_nodes_are_told_from_rings_within_one(ranks, folder):
    assert ranks(2, calibrated, str(folder), QUICK, True) == [0, 0]
    report = report_of(folder)
    assert report["copied"] == [] and "transfer_intra" in report["unidentified"]
    assert report["cost"]["transfer_intra"] == 0 and report["cost"]["node_size"] == 1
    assert all(one["one_node"] == (one["size"] == 1) for one in report["measurements"])


@pytest.mark.parametrize(
    "world, sizes, words",
    [
        (1, {1}, ["planner.capacity_tokens=512"]),
        (3, {1, 2, 3}, []),
        (4, {1, 2}, ["parallel.tensor=2"]),
        (4, {1, 2}, ["parallel.pipeline=2"]),
        (
            4,
            {1, 2, 3, 4},
            ["model.moe.num_experts=4", "parallel.expert=2", "model.moe.dispatcher=allgather"],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_every_layout_is_measured(ranks, folder, world, sizes, words):
    statuses = ranks(world, calibrated, str(folder), [*QUICK, "--lengths", "64,256", *words])
    assert statuses == [0] * world
    report = report_of(folder)
    assert {one["size"] for one in report["measurements"]} == sizes
    assert report["machine"]["hdp"] == max(sizes)
    assert CostModel.load(folder / "COST.json").fixed >= 0


def test_all_ranks_leave_when_the_result_cannot_be_kept(ranks, folder):
    words = [*QUICK, "--out", str(folder / "missing" / "COST.json")]
    assert ranks(2, calibrated, str(folder), words) == [2, 2]
    assert not list(folder.glob("*.json"))
