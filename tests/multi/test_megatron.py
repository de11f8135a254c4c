"""Checkpoints that plain megatron-core writes, imported, trained on and exported."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_writer import (
    ADAM,
    BY_NAME,
    EXPERTS,
    IDS,
    ITERATION,
    ROWS,
    SAMPLES,
    TOKENS,
    batch,
    tensors_of,
    write_all,
)
from test_train import command

DENSE = {"rows": ROWS, "known": IDS, "add_qkv_bias": True}
MOE = {**EXPERTS, "tied": False, "qk_layernorm": True, "rows": IDS}
SHARED = {**MOE, "moe_shared_expert_intermediate_size": 24}
CASES = {
    1: {
        "dense": {**DENSE, "saves": {"": {}, "names": BY_NAME, "no_args": {"args": False}}},
        "moe": {**MOE, "saves": {"": {}, "names": BY_NAME}},
        "bf16": {"rows": IDS, "bf16": True},
    },
    2: {
        "tensor": {"rows": IDS, "tensor": 2, "tied": False},
        "pipeline": {"rows": IDS, "pipeline": 2},
        "expert": {**SHARED, "expert": 2},
    },
}


@pytest.fixture(scope="module")
def foreign(rank_pools, tmp_path_factory):
    """Folders of checkpoints by case, and the losses of the steps after each."""
    home, losses = tmp_path_factory.mktemp("megatron"), {}
    for world, cases in CASES.items():
        wanted = {str(home / name): options for name, options in cases.items()}
        of_ranks = rank_pools.run(world, write_all, wanted, timeout_s=600)
        for name in cases:
            losses[name] = of_ranks[-1][str(home / name)]
    return home, losses


def imported(source, out, *words):
    status, said = command("import", source, out, *words)
    assert status == 0, said
    return said


def differing(foreign_folder, ours):
    """Tensors of an import that are not bit for bit those of the checkpoint, as megatron-core
    reads it; and tensors that only one of the two has."""
    import torch

    from megascale.checkpoint.read import read_piece
    from megascale.checkpoint.storage import read_index

    index, wrong = read_index(ours), []
    plain = {k: v for k, v in tensors_of(foreign_folder).items() if isinstance(v, torch.Tensor)}
    for key, tensor in index.tensors.items():
        if key.endswith(("load_E", "earlier_E")):
            continue
        size = tuple(tensor.size)
        wanted = plain.pop(key.replace("state.fp32_param.", "state.param."), None)
        stored = read_piece(ours, index, key, (0,) * len(size), size)
        if wanted is None or not torch.equal(stored, wanted[: size[0]]):
            wrong.append(key)
    return wrong, [key for key in plain if not key.startswith("optimizer.state.param.")]


@pytest.mark.parametrize("name", ["dense", "moe", "bf16", "tensor", "pipeline", "expert"])
def test_weights_and_moments_are_bit_equal(ranks, foreign, tmp_path, name):
    source = foreign[0] / name
    (said,) = ranks(1, imported, source, tmp_path / "ours", "--vocab-size", IDS)
    assert f"AdamW after 2 steps; lr = {ADAM['lr']}" in said
    assert f"iteration {ITERATION}, {SAMPLES * TOKENS} tokens" in said
    assert (f"{IDS} ids of {ROWS} rows; the {ROWS - IDS} padded" in said) == (name == "dense")
    assert ranks(1, differing, source, tmp_path / "ours") == [([], [])]


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_names_of_single_layers_and_experts_give_the_same_checkpoint(
    ranks, foreign, tmp_path, name
):
    folder, out = foreign[0] / name, tmp_path
    ranks(1, imported, folder, out / "stacked", "--vocab-size", IDS)
    ranks(1, imported, folder / "names", out / "named", "--vocab-size", IDS)
    manifests = [
        json.loads((out / one / "manifest.json").read_text()) for one in ("stacked", "named")
    ]
    assert manifests[0]["files"] == manifests[1]["files"]


def continued(ours, steps):
    """Losses of a branch that keeps the optimizer, on the batch and settings of the original."""
    from megascale.checkpoint.load import begin_from, find_at
    from megascale.config import OptimConfig, SegmentConfig
    from megascale.config.complete import complete
    from megascale.convert.one_rank import run_config
    from megascale.mesh.packing import TokenSequence, pack
    from megascale.model.build import build_model, pack_multiple
    from megascale.optim.build import build_optimizer
    from megascale.runtime import distributed
    from megascale.training.step import Learner, train_step

    found = find_at(ours)
    config = run_config(found)
    model = config.model
    if model.moe is not None:
        model = replace(model, moe=replace(model.moe, balance="none"))
    optim = OptimConfig(
        schedule=(SegmentConfig(shape="constant", lr=ADAM["lr"]),),
        beta1=ADAM["adam_beta1"],
        beta2=ADAM["adam_beta2"],
        eps=ADAM["adam_eps"],
        weight_decay=ADAM["weight_decay"],
        clip_grad_norm=1e9,
    )
    config = replace(complete(replace(config, model=model)), optim=optim)
    ranks = distributed.start(config)
    built = build_model(config, ranks)
    optimizer = build_optimizer(config, built)
    begin_from(found, built, optimizer, True, ranks)
    optimizer.core.reload_model_params()
    learner = Learner(config, ranks, built, optimizer)
    packed = pack(
        [TokenSequence(row[:-1], row[1:]) for row in batch()],
        0,
        pack_multiple(config, ranks.device),
        ranks.device,
    )
    count = batch().shape[0] * TOKENS
    return [train_step(learner, [packed], 1, count, count).loss for _ in range(steps)]


@pytest.mark.parametrize("name", ["dense", "moe", "tensor", "pipeline", "expert"])
def test_a_branch_continues_the_curve(ranks, foreign, tmp_path, name):
    home, losses = foreign
    ranks(1, imported, home / name, tmp_path / "ours", "--vocab-size", IDS)
    (found,) = ranks(1, continued, tmp_path / "ours", len(losses[name]))
    assert found == pytest.approx(losses[name], rel=0, abs=1e-5)


def test_lineage_and_iteration_of_megatron_lm(ranks, foreign, tmp_path):
    home = tmp_path / "theirs"
    shutil.copytree(foreign[0] / "moe", home / f"iter_{ITERATION:07d}")
    (home / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")
    out = tmp_path / "out"
    ranks(1, imported, home, out, "--vocab-size", IDS, "--optimizer", "drop")
    position = json.loads((out / "manifest.json").read_text())
    assert position["optimizer_steps"] == 0
    assert position["position"]["step"] == ITERATION
    assert position["position"]["tokens_seen"] == SAMPLES * TOKENS
    ((status, said),) = ranks(1, command, "lineage", out)
    assert status == 0 and f"from step {ITERATION} ({SAMPLES * TOKENS} tokens)" in said
    assert "by megascale import" in said


class Code:
    def __reduce__(self):
        return os.system, ("touch made-by-a-pickle",)


def refused(ranks, source, out, *words):
    """The one line with which an import ends; nothing is left behind."""
    ((status, said),) = ranks(1, command, "import", source, out, *words)
    assert status == 2 and said.count("\n") == 1 and not out.exists(), said
    return said


def changed(foreign_folder, folder, **arguments):
    """A copy of a checkpoint whose args say something else."""
    import torch

    shutil.copytree(foreign_folder, folder)
    common = torch.load(folder / "common.pt", weights_only=False)
    for name, value in arguments.items():
        setattr(common["args"], name, value)
    torch.save(common, folder / "common.pt")
    return folder


BAD_ARGUMENTS = [
    ({"normalization": "LayerNorm"}, "normalization = LayerNorm is not built"),
    ({"position_embedding_type": "learned_absolute"}, "learned_absolute is not built"),
    ({"position_embedding_type": "none"}, "position_embedding_type = none is not built"),
    ({"add_bias_linear": True}, "add_bias_linear = True is not built"),
    ({"swiglu": False}, "swiglu = False is not built"),
    ({"rotary_percent": 0.5}, "rotary_percent = 0.5 is not built"),
    ({"multi_latent_attention": True}, "multi_latent_attention = True is not built"),
    ({"num_layers": 3}, "2x32 by the architecture|is 2x32, and 3x32"),
    ({"ffn_hidden_size": 64}, "2x128x32"),
    ({"hidden_size": "wide"}, "hidden_size = wide must be a whole number"),
    ({"num_attention_heads": Code()}, "is refused: it asks for posix.system"),
]


@pytest.mark.parametrize("arguments, words", BAD_ARGUMENTS)
def test_other_architectures_are_refused_by_name(ranks, foreign, tmp_path, arguments, words):
    source = changed(foreign[0] / "dense", tmp_path / "theirs", **arguments)
    said = refused(ranks, source, tmp_path / "out", "--vocab-size", IDS)
    assert re.search(words, said), said
    assert not Path("made-by-a-pickle").exists()


def test_bad_checkpoints_are_refused_in_one_line(ranks, foreign, tmp_path):
    home, out = foreign[0] / "dense", tmp_path / "out"
    size = ("--vocab-size", IDS)
    assert "--tokenizer FOLDER or --vocab-size N" in refused(ranks, home, out)
    assert f"{ROWS + 1} ids does not fit the {ROWS} rows" in refused(
        ranks, home, out, "--vocab-size", ROWS + 1
    )
    assert "--architecture FILE" in refused(ranks, home / "no_args", out, *size)
    lost = tmp_path / "lost"
    shutil.copytree(home, lost)
    shard = sorted(lost.glob("*.distcp"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    assert "copy the checkpoint again" in refused(ranks, lost, out, *size)
    shard.unlink()
    assert f"{shard} is missing" in refused(ranks, lost, out, *size)
    shard.write_bytes(whole)
    (lost / ".metadata").write_bytes(pickle.dumps(Code()))
    assert "it asks for posix.system" in refused(ranks, lost, out, *size)
    (lost / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "format 'zarr'" in refused(ranks, lost, out, *size)
    old = tmp_path / "old" / "mp_rank_00"
    old.mkdir(parents=True)
    (old / "model_optim_rng.pt").write_bytes(b"")
    assert "--ckpt-convert-format torch_dist" in refused(ranks, old.parent, out, *size)
    named = tmp_path / "named"
    named.mkdir()
    (named / "latest_checkpointed_iteration.txt").write_text("7")
    assert "iter_0000007, which is not there" in refused(ranks, named, out, *size)
    assert not Path("made-by-a-pickle").exists()
