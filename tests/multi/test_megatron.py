"""Checkpoints that plain megatron-core writes, imported, trained on and exported."""

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
    reads it, and how many were compared."""
    import torch

    from megascale.checkpoint.load import find_at
    from megascale.checkpoint.storage import read_index
    from megascale.checkpoint.tensors import Tensors

    plain = tensors_of(foreign_folder)
    found = find_at(ours)
    names, wrong = set(read_index(found.folder).tensors), []
    state = "optimizer.state."
    for moment in ("", "exp_avg", "exp_avg_sq", "fp32_param"):
        stored = Tensors(found, moment)
        for key, shape in stored.shapes.items():
            if key.endswith(("load_E", "earlier_E")):
                names.discard(key)
                continue
            theirs = f"{state}{'param' if moment == 'fp32_param' else moment}.{key}"
            wanted = plain.pop(theirs if moment else key)
            names.discard(f"{state}{moment}.{key}" if moment else key)
            exact = plain.get(f"{state}param.{key}", wanted) if not moment else wanted
            wanted = (exact if not moment else wanted)[: shape[0]]
            if not torch.equal(stored.read(key), wanted):
                wrong.append((moment, key))
    left = [key for key in plain if not key.startswith(f"{state}param.")]
    return wrong, sorted(names), left


@pytest.mark.parametrize("name", ["dense", "moe", "bf16", "tensor", "pipeline", "expert"])
def test_weights_and_moments_are_bit_equal(ranks, foreign, tmp_path, name):
    source = foreign[0] / name
    (said,) = ranks(1, imported, source, tmp_path / "ours", "--vocab-size", IDS)
    assert f"AdamW after 2 steps; lr = {ADAM['lr']}" in said
    assert f"iteration {ITERATION}, {SAMPLES * TOKENS} tokens" in said
    assert (f"{IDS} ids of {ROWS} rows; the {ROWS - IDS} padded" in said) == (name == "dense")
    assert ranks(1, differing, source, tmp_path / "ours") == [([], [], [])]
