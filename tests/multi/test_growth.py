"""Grown checkpoints: which tensor goes where, and what the grown model computes."""

import json
import shutil

import numpy as np
import pytest
from crash_drill import curve
from memory_limit import on_linux, run_python
from test_checkpoint import Run
from test_train import command
from tiny_corpus import tiny_config

GQA = ("model.num_heads=4", "model.num_kv_heads=2", "model.qk_norm=true")
UNTIED = ("model.tied_embeddings=false", "model.qkv_bias=true")
MASKED = ("--operator", "random", "--factor", "2", "--mask-tokens", "256")
MOE = ("model.moe.num_experts=4", "model.moe.shared_ffn_hidden_size=16")
MOE += ("model.moe.shared_gate=true",)


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
    from megascale.training.step import run_micro_batches

    run = begun(folder, overrides)
    rows = np.random.default_rng(0).integers(0, 100, (8, 25))
    bag = [TokenSequence(row[:-1], row[1:]) for row in rows]
    losses = []
    with torch.no_grad():
        for one in bag:
            batch = pack([one], 100, run.ranks.layout.tensor, run.ranks.device)
            sums = run_micro_batches(run.learner, [batch], 1, forward_only=True)
            losses.append(float(sums[0]))
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


def test_noise_follows_the_seed(ranks, base, tmp_path):
    words = ("--factor", "2", "--noise", "0.2", "--seed")
    key, grown = "decoder.layers.self_attention.linear_proj.weight", {}
    for name, seed in (("a", "1"), ("again", "1"), ("b", "2")):
        ((old, new),) = ranks(1, stored_and_grown, base, tmp_path / name, *words, seed)
        grown[name] = new[key]
        assert not new[key].equal(old[key][[0, 1] * 2])
    assert grown["a"].equal(grown["again"]) and not grown["a"].equal(grown["b"])


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


def rate(folder):
    """The learning rate at which the run of a checkpoint stood."""
    from megascale.checkpoint.load import read_manifest
    from megascale.config import parse_config
    from megascale.run.start import rate_of

    position = read_manifest(folder).position
    return rate_of(position, parse_config(position.config))


def test_branches_become_experts(ranks, tmp_path):
    for steps in (1, 2):  # of equal initial weights
        ranks(1, run_and_save, tmp_path / f"b{steps}", (), 1, steps)
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
    ranks(1, grow, out, *MASKED, "--out", tmp_path / "deeper")
    (deeper,) = ranks(1, tensors, tmp_path / "deeper")
    for expert in (0, 1):
        drawn = deeper[f"decoder.layers.self_attention.experts.{expert}.linear_qkv.weight"][2:]
        assert 0.01 < drawn.std() < 0.03
    assert rate(out) == rate(tmp_path / "b1") != rate(tmp_path / "b2")
    ranks(1, grow, out, "--factor", "2", "--out", tmp_path / "deep")
    assert rate(tmp_path / "deep") == rate(out)


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
        (["BASE", "SEED", "--operator", "upcycle"], "do not come from one model (megascale line"),
        (["MOE", "--operator", "upcycle"], "has experts already; upcycle a dense one"),
        (["BASE", "--operator", "upcycle", "--top-k", "9"], "top-k 9 must be from 2 to the 8"),
        (["BASE", "--operator", "upcycle", "--top-k", "1"], "top-k 1 must be from 2 to the 8"),
        (["BASE", "--experts", "4"], "--experts goes with upcycle, not stack"),
        (
            ["BASE", "--operator", "zero", "--noise", "0.1"],
            "--noise goes with stack or interpolate or resize",
        ),
        (["BASE", "--operator", "random"], "--operator random needs --mask-tokens, such as 1B"),
        (["BASE", "--operator", "resize"], "--operator resize needs --vocab, the ids"),
        (["BASE", "--operator", "resize", "--vocab", "99"], "--vocab 99 is not above the 100 ids"),
        (["BASE", "--optimizer", "keep"], "--optimizer keep: give drop or grow"),
        (["PARTIAL"], "was not written to its end (its manifest.json comes last); take"),
        (["BASE", "--operator", "learn"], "has read no data that a map could be learned on"),
        (["BASE", "--vocab", "200"], "--vocab goes with resize, not stack"),
        (["BASE", "--mask-tokens", "1M"], "--mask-tokens goes with random, not stack"),
        (
            ["BASE", "BASE", "--operator", "upcycle", "--optimizer", "grow"],
            "there is no rule for moments under --operator upcycle; leave them behind",
        ),
        (["MASKED", "--optimizer", "grow"], "holds no moments of AdamW that could grow"),
        (["SOAP", "--optimizer", "grow"], "holds no moments of AdamW that could grow"),
        (["MASKED", *MASKED], "still masked; train it for 256 more tokens before"),
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
    rank_pools.run(1, run_and_save, folder / "SEED", (), 2)
    shutil.copytree(next((folder / "BASE/checkpoints").glob("0*")), folder / "PARTIAL")
    (folder / "PARTIAL/manifest.json").unlink()
    rank_pools.run(1, run_and_save, folder / "SOAP", ["optim.name=soap"])
    rank_pools.run(1, grow, folder / "BASE", *MASKED, "--out", folder / "MASKED")
    return folder


def test_the_paper_connects_most_layers():
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    from megascale.growth.layer_orders import connection_rate, interpolated, stacked

    assert connection_rate(stacked(8, 3)) == 21 / 23
    assert connection_rate(interpolated(8, 3)) == 7 / 23
    assert stacked(6, 4) == [0, 1, 2, 3, 4, 5] * 4


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growing")
    config = tiny_config(folder)
    words = ["growth.at_tokens=3000", "growth.factor=2", "train.tokens=6000", "eval.every_steps=0"]
    return [config, *words, "parallel.pipeline=2", "checkpoint.save_every_steps=2"]


def growing_patiently(*words):
    """(exit status, the longest that this rank would wait for another, marks while it grew)."""
    from unittest.mock import patch

    import torch

    from megascale.run import folder
    from megascale.runtime.heartbeat import MARKS, pulse
    from megascale.training import loop

    seen = []

    def watched(ranks, action):
        marks = pulse._page[MARKS]
        folder.on_first_rank(ranks, action)
        options = ranks.control._get_backend(torch.device("cpu")).options
        seen.append((options._timeout.total_seconds(), pulse._page[MARKS] - marks))

    with patch.object(loop, "on_first_rank", watched):
        status, _ = command("train", *words)
    return status, *max(seen)


def test_ranks_wait_while_one_grows_the_model_for_them(ranks, growing, tmp_path):
    words = (*growing, f"run_dir={tmp_path / 'run'}", "train.tokens=3000")
    first, second = ranks(2, growing_patiently, *words)
    assert first[:2] == second[:2] == (0, 7 * 24 * 3600)
    assert first[2] > second[2]


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


UNDER_A_LIMIT = """
import sys
from memory_limit import limit_memory
from megascale import cli
from megascale.runtime import distributed
distributed.prepare_device("cpu")
base, warm, out, size = *sys.argv[1:4], int(sys.argv[4])
words = ["--operator", "stack", "--factor", "2", "--out"]
assert cli.main(["grow", sys.argv[5], *words, warm]) == 0  # loads what is loaded once
limit_memory(size // 4)
sys.exit(cli.main(["grow", base, *words, out]))
"""


@on_linux
def test_the_command_needs_a_quarter_of_the_checkpoint(ranks, tmp_path):
    """A whole model of four times the memory that the process may take, its count doubled."""
    small, base, out = tmp_path / "small", tmp_path / "base", tmp_path / "out"
    shape = ["model.hidden_size=512", "model.num_layers=1", "model.num_heads=8"]
    ranks(1, run_and_save, small, shape)
    words = ("--operator", "stack", "--factor", "24", "--out", base)
    assert ranks(1, command, "grow", small, *words)[0][0] == 0
    size = sum(file.stat().st_size for file in base.rglob("*") if file.is_file())
    said = run_python(UNDER_A_LIMIT, base, tmp_path / "warm", out, size, small)
    assert size > 150_000_000
    grown = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert grown == pytest.approx(2 * size, rel=0.02)
    assert "24 layers become 48" in said


def test_plan_and_picture_show_both_models_of_a_run_that_grows(growing, tmp_path):
    status, said = command("plan", *growing, f"run_dir={tmp_path}", "--ranks", "2")
    assert status == 0 and "grown model             stack x 2" in said
    assert "shape                 2 layers x 32" in said
    assert "shape                 4 layers x 32" in said
    out = tmp_path / "pictures" / "schedule.png"
    status, said = command("plot", "--schedule", *growing, "--out", out)
    assert status == 0 and out.read_bytes().startswith(b"\x89PNG"), said


def test_growth_that_has_been_done_stays(ranks, growing, tmp_path):
    run = tmp_path / "run"
    assert ranks(2, command, "train", *growing, f"run_dir={run}")[0][0] == 0
    for change in ("growth.operator=interpolate", "growth.noise=0.1", "growth.at_tokens=2000"):
        words = [*growing, f"run_dir={run}", change, "--resume", "auto"]
        (status, said), _ = ranks(2, command, "train", *words)
        assert status == 2 and "growth was 'megascale grow --operator stack --factor 2'" in said
        assert said.count("\n") == 1
    status, said = command("lineage", tmp_path / "run-base")
    lines = [line.split(", ")[0] for line in said.splitlines()]
    base = tmp_path / "run-base"
    assert status == 0 and lines == [f"{base}  <-- this one", f"  {base / 'grown'}", f"    {run}"]
    status, said = command("lineage", tmp_path)
    assert status == 2 and "no run; give a run_dir" in said


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


@pytest.mark.parametrize("read", [(), ["parallel.tensor=2"], ["parallel.pipeline=2"]], ids=str)
def test_masked_layers_keep_the_function(ranks, base, tmp_path, read):
    ranks(1, grow, base, *MASKED, "--out", tmp_path / "out")
    (before,) = ranks(1, token_losses, base)
    world = 2 if read else 1
    after = np.sum(ranks(world, token_losses, tmp_path / "out", read), axis=0)
    np.testing.assert_allclose(after, before, rtol=2e-6)


def test_masked_layers_are_new_and_above(ranks, base, tmp_path):
    ((before, after),) = ranks(1, stored_and_grown, base, tmp_path / "out", *MASKED)
    assert after.pop("decoder.layers.closed_tokens").flatten().tolist() == [0, 0, 256, 256]
    assert before.keys() == after.keys()
    for key, old in before.items():
        new = after[key]
        if not key.startswith("decoder.layers."):
            assert new.equal(old)
            continue
        assert new[:2].equal(old), key
        if new[0].dim() > 1:  # matrices begin as in a model of 4 layers
            out = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            assert not new[2].equal(new[3])
            assert float(new[2:].std()) == pytest.approx(0.02 / (8**0.5 if out else 1), rel=0.2)


def masked_outputs(folder):
    """What a masked layer makes of one input: closed, half open, open, and without a mask."""
    import torch

    from megascale.mesh.packing import TokenSequence, pack

    run = begun(folder)
    layer, ids = run.model.masked_layers[-1], np.arange(16)
    segments = pack([TokenSequence(ids, ids)], 0, 1, run.ranks.device).segments
    x = torch.randn(16, 1, 32)
    outputs = []
    with torch.no_grad():
        for closed in (256, 128, 0):
            layer.closed_tokens.fill_(closed)
            outputs.append(layer(x, attention_mask=None, packed_seq_params=segments)[0])
        plain = super(type(layer).__mro__[1], layer).forward
        return x, *outputs, plain(x, attention_mask=None, packed_seq_params=segments)[0]


def test_a_mask_is_the_way_from_input_to_output(ranks, tmp_path):
    import torch

    ranks(1, run_and_save, tmp_path / "base", ())
    ranks(1, grow, tmp_path / "base", *MASKED, "--out", tmp_path / "out")
    ((x, closed, half, opened, plain),) = ranks(1, masked_outputs, tmp_path / "out")
    assert closed.equal(x) and opened.equal(plain) and not plain.equal(x)
    torch.testing.assert_close(half, (x + plain) / 2)


def parts_of_the_way(folder, precision):
    """What the masks of a new layer are after each step."""
    run = begun(folder, [f"train.precision={precision}"])
    masks = []
    for step in range(6):
        run.train(range(step, step + 1))
        masks.append([float(1 - m.closed_tokens / 256) for m in run.model.masked_layers])
    return masks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_open_with_the_tokens(ranks, tmp_path, precision):
    ranks(1, run_and_save, tmp_path / "base", ())
    ranks(1, grow, tmp_path / "base", *MASKED, "--out", tmp_path / "out")
    (masks,) = ranks(1, parts_of_the_way, tmp_path / "out", precision)
    assert masks == [[1, 1, m, m] for m in (0.25, 0.5, 0.75, 1, 1, 1)]


OPENING = ("growth.operator=random", "growth.mask_tokens=4500", "checkpoint.save_every_steps=2")


@pytest.fixture(scope="module")
def masked_run(rank_pools, growing, tmp_path_factory):
    """A run over a mask that is open after five of its six steps, on one rank."""
    run = tmp_path_factory.mktemp("masked") / "run"
    words = ["train", *growing, *OPENING, "parallel.pipeline=1", f"run_dir={run}"]
    words.append("checkpoint.keep_last=9")
    ((status, said),) = rank_pools.run(1, command, *words)
    assert status == 0, said
    return run


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_masks_open_alike_in_all_layouts(ranks, growing, masked_run, tmp_path, layout):
    words = [*growing, *OPENING, "parallel.pipeline=1", layout, f"run_dir={tmp_path / 'run'}"]
    (status, said), _ = ranks(2, command, "train", *words)
    assert status == 0, said
    one, two = (
        [row["loss"] for row in curve(run).values() if "loss" in row]
        for run in (masked_run, tmp_path / "run")
    )
    assert two == pytest.approx(one, rel=1e-4) and len(one) == 6


def test_an_opening_run_resumes_bit_equal(ranks, growing, masked_run, tmp_path):
    for name in ("run", "run-base"):
        shutil.copytree(masked_run.parent / name, tmp_path / name)
    for step in ("00000004", "00000006"):
        shutil.rmtree(next((tmp_path / "run/checkpoints").glob(f"*{step[-4:]}")))
    words = [*growing, *OPENING, "parallel.pipeline=1", "checkpoint.keep_last=9"]
    words += [f"run_dir={tmp_path / 'run'}", "--resume", "auto"]
    ((status, said),) = ranks(1, command, "train", *words)
    assert status == 0 and "step 2" in said, said
    compared = [
        [row.get("loss") for row in curve(run).values()] for run in (masked_run, tmp_path / "run")
    ]
    assert compared[0] == compared[1]


def all_tensors(folder):
    """Weights and moments of a checkpoint."""
    from megascale.checkpoint.load import find_at
    from megascale.checkpoint.tensors import Tensors

    found = find_at(folder)
    return {
        (moment, key): stored.read(key)
        for moment in ("", "exp_avg", "exp_avg_sq")
        for stored in [Tensors(found, moment)]
        for key in stored.shapes
    }


@pytest.mark.parametrize(
    "operator, order",
    [
        ("stack", [0, 1] * 2),
        ("interpolate", [0, 0, 1, 1]),
        ("zero", [0, 1, None, None]),
        ("random", [0, 1, None, None]),
    ],
)
def test_moments_go_where_their_layers_go(ranks, base, tmp_path, operator, order):
    import torch

    words = [*MASKED[2:], "--operator", operator] if operator == "random" else ["--factor", "2"]
    words += ["--operator", operator, "--optimizer", "grow", "--out", tmp_path / "out"]
    ranks(1, grow, base, *words)
    (before,), (after,) = ranks(1, all_tensors, base), ranks(1, all_tensors, tmp_path / "out")
    moments = [name for name in before if name[0]]
    assert len(moments) > 10
    for name in moments:
        old = before[name]
        if name[1].startswith("decoder.layers."):
            old = torch.stack([torch.zeros_like(old[0]) if i is None else old[i] for i in order])
        assert after[name].equal(old), name


STILL = ("optim.lr=1e-30", "optim.clip_grad_norm=0")


def moments_of_a_step(folder, overrides):
    """Moments after the first step of a new optimizer, by weight."""
    run = begun(folder, [*overrides, *STILL])
    run.train(range(1))
    prefix = "optimizer.state."
    state = run.state()
    return {
        tuple(key.removeprefix(prefix).split(".", 1)): one
        for key, one in state.items()
        if key.startswith(prefix)
    }


def grow_without_noise(*words):
    """Wider, with parts that do not differ."""
    from unittest import mock

    from megascale.growth import width

    with mock.patch.object(width, "SPREAD", 0.0):
        return grow(*words)


@pytest.mark.parametrize(
    "model", [(), GQA, (*UNTIED, *GQA), (*MOE, "model.moe.balance=none")], ids=str
)
def test_wider_moments_are_those_of_wider_gradients(ranks, tmp_path, model):
    import torch

    ranks(1, run_and_save, tmp_path / "base", (*model, *STILL))
    words = ("--operator", "width", "--factor", "2", "--optimizer", "grow")
    ranks(1, grow_without_noise, tmp_path / "base", *words, "--out", tmp_path / "wide")
    (grown,) = ranks(1, all_tensors, tmp_path / "wide")
    (expected,) = ranks(1, moments_of_a_step, tmp_path / "wide", ())
    assert {name for name in grown if name[0]} == expected.keys()
    for name, one in expected.items():
        largest = float(one.abs().max())
        torch.testing.assert_close(grown[name], one, rtol=1e-4, atol=1e-5 * largest, msg=str(name))


def test_grown_moments_are_taken_along(ranks, tmp_path):
    ranks(2, run_and_save, tmp_path / "base", ["train.precision=bf16", "parallel.tensor=2"], 1, 2)
    ranks(1, grow, tmp_path / "base", "--optimizer", "grow", "--out", tmp_path / "out")
    (grown,) = ranks(1, all_tensors, tmp_path / "out")
    (state,) = ranks(1, masters_and_weights, tmp_path / "out", "bf16", True)
    key = "decoder.layers.mlp.linear_fc2.weight"
    assert state[f"optimizer.state.exp_avg.{key}"].equal(grown["exp_avg", key])
    assert state[f"optimizer.state.fp32_param.{key}"].equal(grown["", key])


def test_a_growing_run_takes_its_moments_along(ranks, growing, tmp_path):
    words = [*growing, "parallel.pipeline=1", f"run_dir={tmp_path / 'run'}"]
    ((status, said),) = ranks(1, command, "train", *words, "growth.optimizer=grow")
    assert status == 0 and "the optimizer goes on" in said, said


ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.mark.parametrize("vocab", [104, 250])
@pytest.mark.parametrize("noise", ["0", "0.1"])
def test_new_ids_get_the_mean_of_the_old(ranks, base, tmp_path, vocab, noise):
    import torch

    words = ("--operator", "resize", "--vocab", str(vocab), "--noise", noise)
    ((before, after),) = ranks(1, stored_and_grown, base, tmp_path / "out", *words)
    assert before.keys() == after.keys()
    for key, old in before.items():
        if key not in ROWS:
            assert after[key].equal(old), key
            continue
        assert after[key].shape == (vocab, 32) and after[key][:100].equal(old[:100])
        apart = after[key][100:] - old[:100].mean(dim=0)
        if noise == "0":
            assert float(apart.abs().max()) < 1e-7
        else:
            told = apart / old[:100].std(dim=0)
            assert float(told.std()) == pytest.approx(0.1, rel=0.2)
            assert len(torch.unique(told, dim=0)) == len(told)


def known_logits(folder, overrides=()):
    """Logits of the first 100 ids, and all of a later id, from this rank's part of the columns."""
    import torch

    from megascale.mesh.packing import TokenSequence, pack

    run = begun(folder, overrides)
    ids = np.arange(20)
    batch = pack([TokenSequence(ids, ids)], 0, run.ranks.layout.tensor, run.ranks.device)
    with torch.no_grad():
        return run.model.chunks[0](
            input_ids=batch.tokens_T[None],
            position_ids=batch.segments.positions_T[None],
            attention_mask=None,
            packed_seq_params=batch.segments,
        )[0]


@pytest.mark.parametrize("written", [["parallel.tensor=2"], ["parallel.pipeline=2"]], ids=str)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_resized_model_says_the_same_of_old_ids(ranks, tmp_path, written, tied):
    import torch

    ranks(2, run_and_save, tmp_path / "base", [*written, f"model.tied_embeddings={tied}"])
    words = ("--operator", "resize", "--vocab", "300", "--optimizer", "grow")
    ranks(1, grow, tmp_path / "base", *words, "--out", tmp_path / "out")
    (before,), parts = (
        ranks(1, known_logits, tmp_path / "base"),
        ranks(2, known_logits, tmp_path / "out", ["parallel.tensor=2"]),
    )
    after = torch.cat(list(parts), dim=1)
    assert after.shape == (20, 304) and bool(after[:, 300:].isneginf().all())
    torch.testing.assert_close(after[:, :100], before[:, :100], rtol=1e-5, atol=1e-6)
    mean = before[:, :100].mean(dim=1, keepdim=True).expand(-1, 200)
    torch.testing.assert_close(after[:, 100:300], mean, rtol=1e-4, atol=1e-6)
    (grown,) = ranks(1, all_tensors, tmp_path / "out")
    moment = grown["exp_avg", ROWS[0]]
    assert moment[:100].abs().max() > 0 and moment[100:].abs().max() == 0
    ranks(1, masters_and_weights, tmp_path / "out", "fp32", True)  # which fits the model
