"""Grown checkpoints: which tensor goes where, and what the grown model computes."""

import json
import shutil

import numpy as np
import pytest
from crash_drill import curve
from test_checkpoint import Run
from test_train import command
from tiny_corpus import tiny_config

GQA = ("model.num_heads=4", "model.num_kv_heads=2", "model.qk_norm=true")
UNTIED = ("model.tied_embeddings=false", "model.qkv_bias=true")
MOE = ("model.moe.num_experts=4", "model.moe.shared_ffn_hidden_size=16")


def run_and_save(folder, overrides, seed=1, steps=1):
    """Train a little and save, with a config in the manifest."""
    from megascale.checkpoint.manifest import Position
    from megascale.config import dump_config

    run = Run(list(overrides), seed)
    run.train(range(steps))
    place = Position(steps, 64 * steps, 1, dump_config(run.config), {})
    (result,) = run.saver(folder).save(place, run.model, run.optimizer)
    assert result.error is None


def begun(folder, overrides=(), keep=False):
    """A run of other initial weights that starts from a checkpoint, with its model."""
    import yaml

    from megascale.checkpoint.load import begin_from, find_at

    found = find_at(folder)
    flat = {}

    def walk(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(yaml.safe_load(found.manifest.position.config)["model"], "model.")
    words = [f"{key}={json.dumps(value)}" for key, value in flat.items()]
    run = Run([*words, *overrides], seed=7)
    begin_from(found, run.model, run.optimizer, keep, run.ranks)
    return run


def token_losses(folder, overrides=()):
    """Losses of the tokens of two sequences (on the last stage), in whatever layout."""
    import torch

    from megascale.mesh.packing import TokenSequence, pack
    from megascale.train.step import run_micro_batches

    run = begun(folder, overrides)
    rows = np.random.default_rng(0).integers(0, 100, (8, 25))
    bag = [TokenSequence(row[:-1], row[1:]) for row in rows]
    losses = []
    with torch.no_grad():
        for one in bag:
            batch = pack([one], 100, run.ranks.layout.tensor, run.ranks.device)
            losses.append(run_micro_batches(run.learner, [batch], 1, forward_only=True)[0])
    return losses


def tensors(folder):
    """All weights of a checkpoint."""
    from megascale.checkpoint.load import find_at
    from megascale.checkpoint.tensors import Tensors

    stored = Tensors(find_at(folder))
    return {key: stored.read(key) for key in stored.shapes}


def grow(*words):
    """Grow on this rank, as a user does."""
    status, said = command("grow", *words)
    assert status == 0, said
    return said


def stored_and_grown(base, out, *words):
    """Tensors before and after."""
    grow(base, *words, "--out", out)
    return tensors(base), tensors(out)


@pytest.fixture(
    scope="module", params=[(), GQA, (*UNTIED, *GQA), MOE], ids=["tied", "gqa", "untied", "moe"]
)
def base(request, rank_pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    rank_pools.run(1, run_and_save, folder, request.param)
    return folder


@pytest.mark.parametrize(
    "operator, order", [("stack", [0, 1] * 3), ("interpolate", [0, 0, 0, 1, 1, 1])]
)
def test_layers_are_copied_in_order(ranks, base, tmp_path, operator, order):
    words = ("--operator", operator, "--factor", "3")
    ((before, after),) = ranks(1, stored_and_grown, base, tmp_path / "out", *words)
    assert before.keys() == after.keys()
    for key, old in before.items():
        assert after[key].equal(old[order] if key.startswith("decoder.layers.") else old), key


def test_stacking_changes_the_function(ranks, base, tmp_path):
    ranks(1, grow, base, "--factor", "2", "--out", tmp_path / "out")
    (before,), (after,) = ranks(1, token_losses, base), ranks(1, token_losses, tmp_path / "out")
    assert np.abs(np.subtract(before, after)).max() > 1e-3


@pytest.mark.parametrize("operator", ["zero", "width"])
@pytest.mark.parametrize("factor", ["2", "3"])
def test_some_operators_keep_the_function(ranks, base, tmp_path, operator, factor):
    words = ("--operator", operator, "--factor", factor, "--out", tmp_path / "out")
    ranks(1, grow, base, *words)
    (before,), (after,) = ranks(1, token_losses, base), ranks(1, token_losses, tmp_path / "out")
    np.testing.assert_allclose(after, before, rtol=2e-6)


def after_training(folder):
    """Weights after three steps."""
    run = begun(folder, ["optim.lr=1e-2", "optim.warmup_tokens=1"])
    run.train(range(3))
    return run.state()


def test_wider_units_part_in_training(ranks, tmp_path):
    ranks(1, run_and_save, tmp_path / "base", ())
    words = ("--operator", "width", "--factor", "2", "--out", tmp_path / "wide")
    ranks(1, grow, tmp_path / "base", *words)
    (state,) = ranks(1, after_training, tmp_path / "wide")
    gates = state["decoder.layers.mlp.linear_fc1.weight"][0]
    first, second = gates[: len(gates) // 4], gates[len(gates) // 4 : len(gates) // 2]
    assert ((first - second).abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize(
    "experts",
    [
        ["--experts", "4", "--top-k", "4"],
        ["--experts", "3", "--top-k", "2"],
        ["--experts", "4", "--top-k", "2", "--attention-experts", "2"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("model", [UNTIED, GQA], ids=["untied", "grouped"])
def test_equal_branches_give_the_dense_model(ranks, tmp_path, experts, model):
    ranks(1, run_and_save, tmp_path / "base", model)
    branches = [tmp_path / "base"] * (2 if "--attention-experts" in experts else 1)
    words = (*branches, "--operator", "upcycle", *experts, "--out", tmp_path / "out")
    ranks(1, grow, *words)
    (before,) = ranks(1, token_losses, tmp_path / "base")
    (after,) = ranks(1, token_losses, tmp_path / "out")
    np.testing.assert_allclose(after, before, rtol=2e-6)


def test_branches_become_experts(ranks, tmp_path):
    for seed in (1, 2):
        ranks(1, run_and_save, tmp_path / f"b{seed}", (), seed)
    words = ("--operator", "upcycle", "--experts", "4", "--attention-experts", "2")
    out = tmp_path / "out"
    ranks(1, grow, tmp_path / "b1", tmp_path / "b2", *words, "--out", out)
    (one,), (two,), (after,) = (
        ranks(1, tensors, folder) for folder in (tmp_path / "b1", tmp_path / "b2", out)
    )
    for name in ("linear_fc1", "linear_fc2"):
        mixed = after[f"decoder.layers.mlp.experts.experts.{name}.weight"]
        for expert, branch in enumerate((one, two, one, two)):
            assert mixed[:, expert].equal(branch[f"decoder.layers.mlp.{name}.weight"])
    for expert, branch in enumerate((one, two)):
        key = f"decoder.layers.self_attention.experts.{expert}.linear_qkv.weight"
        assert after[key].equal(branch["decoder.layers.self_attention.linear_qkv.weight"])
    for key in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"):
        assert after[key].equal((one[key] + two[key]) / 2)
    routers = after["decoder.layers.mlp.router.weight"]
    assert routers.shape == (2, 4, 32) and 0.01 < routers.std() < 0.03


@pytest.mark.parametrize(
    "written, read",
    [
        (["parallel.tensor=2"], ["parallel.pipeline=2"]),
        (["parallel.pipeline=2"], ["parallel.tensor=2"]),
        (["model.moe.num_experts=4", "parallel.expert=2"], ["parallel.tensor=2"]),
        (["train.precision=bf16"], ["parallel.tensor=2"]),
    ],
    ids=lambda words: "+".join(words),
)
def test_any_layout_grows_into_any_other(ranks, tmp_path, written, read):
    ranks(2, run_and_save, tmp_path / "base", written)
    ranks(1, grow, tmp_path / "base", "--factor", "2", "--out", tmp_path / "out")
    plain = ["train.precision=fp32"]
    expected = ranks(1, token_losses, tmp_path / "out", plain)[0]
    found = np.sum(ranks(2, token_losses, tmp_path / "out", plain + read), axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def masters_and_weights(folder, precision, keep):
    """State of a run that starts from a checkpoint in another precision."""
    run = begun(folder, [f"train.precision={precision}"], keep)
    return run.state()


def test_a_start_converts_precision_and_leaves_moments_behind(ranks, tmp_path):
    ranks(2, run_and_save, tmp_path / "base", ["train.precision=bf16"], 1, 2)
    key = "decoder.layers.mlp.linear_fc2.weight"
    (kept,) = ranks(1, masters_and_weights, tmp_path / "base", "bf16", True)
    (reset,) = ranks(1, masters_and_weights, tmp_path / "base", "bf16", False)
    (exact,) = ranks(1, masters_and_weights, tmp_path / "base", "fp32", False)
    master = kept[f"optimizer.state.fp32_param.{key}"]
    assert not master.equal(master.bfloat16().float())  # or the test would show nothing
    assert reset[f"optimizer.state.fp32_param.{key}"].equal(master)
    assert exact[key].equal(master) and kept[key].equal(master.bfloat16())
    assert kept[f"optimizer.state.exp_avg.{key}"].abs().max() > 0
    assert reset[f"optimizer.state.exp_avg.{key}"].abs().max() == 0
    assert reset[f"optimizer.state.exp_avg_sq.{key}"].abs().max() == 0


def test_the_optimizer_is_kept_where_there_is_one(ranks, tmp_path):
    ranks(1, run_and_save, tmp_path / "base", ())
    ranks(1, grow, tmp_path / "base", "--out", tmp_path / "out")
    with pytest.raises(AssertionError, match="holds no state of an optimizer; set start.opt"):
        ranks(1, masters_and_weights, tmp_path / "out", "fp32", True)


@pytest.mark.parametrize(
    "words, message",
    [
        (["BASE", "--operator", "stak"], "--operator stak: give one of stack, interpolate"),
        (["BASE", "--factor", "1"], "--factor must be at least 2"),
        (["BASE", "--noise", "2"], "--noise 2 must be a number from 0 to below 1"),
        (["BASE", "BASE"], "operator stack grows one checkpoint, not 2"),
        (["BASE", "OTHER", "--operator", "upcycle"], "not of the same model"),
        (["MOE", "--operator", "upcycle"], "has experts already; upcycle a dense one"),
        (["BASE", "--operator", "upcycle", "--top-k", "9"], "top-k 9 must be from 2 to the 8"),
        (["BASE", "--operator", "upcycle", "--top-k", "1"], "top-k 1 must be from 2 to the 8"),
        (["nowhere"], "nowhere holds no checkpoint; give a run_dir"),
        (["BASE", "--out", "BASE"], "exists; choose another folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(ranks, few, tmp_path, words, message):
    words = [str(few / word) if word.isupper() else word for word in words]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    ((status, said),) = ranks(1, command, "grow", *words)
    assert status == 2 and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def few(rank_pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    rank_pools.run(1, run_and_save, folder / "BASE", ())
    rank_pools.run(1, run_and_save, folder / "OTHER", ["model.ffn_hidden_size=96"])
    rank_pools.run(1, run_and_save, folder / "MOE", ["model.moe.num_experts=4"])
    return folder


def test_the_paper_connects_most_layers():
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    from megascale.growth.depth import connection_rate, interpolated, stacked

    assert connection_rate(stacked(8, 3)) == 21 / 23
    assert connection_rate(interpolated(8, 3)) == 7 / 23
    assert stacked(6, 4) == [0, 1, 2, 3, 4, 5] * 4


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growing")
    config = tiny_config(folder)
    words = ["growth.at_tokens=3000", "growth.factor=2", "train.tokens=6000", "eval.every_steps=0"]
    return [config, *words, "parallel.pipeline=2", "checkpoint.save_every_steps=2"]


def test_a_run_grows_by_itself(ranks, growing, tmp_path):
    run = tmp_path / "run"
    (status, said), _ = ranks(2, command, "train", *growing, f"run_dir={run}")
    assert status == 0, said
    small, grown = curve(tmp_path / "run-base"), curve(run)
    assert list(small) == [1, 2, 3] and list(grown) == [0, 1, 2, 3, 4, 5, 6]
    for step in (1, 3):  # the same schedule, from its beginning
        assert grown[step]["lr"] == pytest.approx(small[step]["lr"], rel=0.02)
    assert grown[1]["loss"] < small[1]["loss"] - 0.3
    assert "source 'tiny' goes on after the" in said and "2 layers become 4" in said
    (state,) = ranks(1, tensors, run)
    assert state["decoder.layers.mlp.linear_fc2.weight"].shape[0] == 4


@pytest.mark.parametrize("stop_in", ["run-base", "run"])
def test_a_growing_run_resumes_in_either_half(ranks, growing, tmp_path, stop_in):
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        (status, said), _ = ranks(2, command, "train", *growing, f"run_dir={folder}")
        assert status == 0, said
    expected = [row["loss"] for step, row in curve(whole).items() if step]
    # as if killed in one half, before its last save
    shutil.rmtree(sorted((tmp_path / stop_in / "checkpoints").glob("0*"))[-1])
    if stop_in == "run-base":
        shutil.rmtree(run)
        shutil.rmtree(tmp_path / "run-base/grown")
    answers = ranks(2, command, "train", *growing, f"run_dir={run}", "--resume", "auto")
    assert answers[0][0] == 0, answers[0][1]
    found = [row["loss"] for step, row in curve(run).items() if step]
    assert found == expected
