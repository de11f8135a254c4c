"""Exports that a plain script of megatron-core loads, by its default strictness, and trains on."""

import json

import pytest
from megatron_writer import (
    EXPERTS,
    IDS,
    ITERATION,
    ROWS,
    SAMPLES,
    continue_from,
    tensors_of,
    write_all,
)
from test_huggingface_models import corpus, trained
from test_train import command

assert corpus  # a fixture

MOE = {**EXPERTS, "tied": False, "qk_layernorm": True, "moe_shared_expert_intermediate_size": 24}
SOURCES = {
    "padded": {"rows": ROWS, "known": IDS},
    "dense": {"rows": IDS, "add_qkv_bias": True},
    "moe": {"rows": IDS, **MOE},
    "bf16": {"rows": IDS, "bf16": True},
}
LOADS = [
    ("padded", 1, {}),
    ("dense", 2, {"tensor": 2}),
    ("moe", 1, {}),
    ("moe", 2, {"pipeline": 2}),
    ("moe", 2, {"expert": 2}),
    ("bf16", 2, {"tensor": 2}),
]


@pytest.fixture(scope="module")
def foreign(rank_pools, tmp_path_factory):
    """Checkpoints of megatron-core by name, imported, and the losses of the steps after each."""
    home = tmp_path_factory.mktemp("megatron")
    wanted = {str(home / name): options for name, options in SOURCES.items()}
    (losses,) = rank_pools.run(1, write_all, wanted, timeout_s=600)
    for name in SOURCES:
        done(rank_pools.run, "import", home / name, home / f"{name}-ours", "--vocab-size", IDS)
    return home, {name: losses[str(home / name)] for name in SOURCES}


def done(ranks, *words):
    ((status, said),) = ranks(1, command, *words)
    assert status == 0, said
    return said


def plain(folder):
    import torch

    found = tensors_of(folder)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def differing(first, second):
    """Names of the first checkpoint's tensors whose rows of ids are others in the second."""
    import torch

    def same(one, other):
        rows = IDS if len(one) == ROWS else None  # padded rows are 0 in an export
        return one.dtype == other.dtype and torch.equal(one[:rows], other[:rows])

    one, other = plain(first), plain(second)
    return [key for key in one if key not in other or not same(one[key], other[key])]


@pytest.mark.parametrize("name, world, cut", LOADS)
def test_megatron_core_loads_an_export_and_continues_the_curve(
    ranks, foreign, tmp_path, name, world, cut
):
    home, losses = foreign
    words = ("--expert-parallel", 2) if "expert" in cut else ()
    said = done(
        ranks, "export", home / f"{name}-ours", tmp_path / "out", "--to", "megatron", *words
    )
    assert "AdamW after 2 steps" in said
    folder = tmp_path / "out" / f"iter_{ITERATION:07d}"
    options = {**SOURCES[name], **cut}
    again = tmp_path / "again"
    answers = ranks(world, continue_here, str(folder), str(again), options, timeout_s=600)
    iteration, found, curve = answers[-1]
    assert iteration == found["iteration"] == ITERATION
    assert found["consumed_train_samples"] == SAMPLES
    if name != "bf16":
        # later losses depend on the learning rate, which an import does not know
        assert curve[0] == pytest.approx(losses[name][0], rel=0, abs=1e-5)
    assert ranks(1, differing, home / name, tmp_path / "again") == [[]]


def continue_here(folder, again, options):
    return continue_from(folder, 2, again, **options)


@pytest.mark.parametrize("name", SOURCES)
def test_a_round_trip_is_bit_equal(ranks, foreign, tmp_path, name):
    home, _ = foreign
    done(ranks, "export", home / f"{name}-ours", tmp_path / "out", "--to", "megatron")
    done(ranks, "import", tmp_path / "out", tmp_path / "back", "--vocab-size", IDS)
    one, other = (
        json.loads((folder / "manifest.json").read_text())
        for folder in (home / f"{name}-ours", tmp_path / "back")
    )
    assert one["files"] == other["files"]
    for field in ("step", "tokens_seen", "config"):
        assert one["position"][field] == other["position"][field]
    assert one["optimizer_steps"] == other["optimizer_steps"]


def test_weights_alone_and_what_is_refused(ranks, foreign, tmp_path):
    home, _ = foreign
    ours, out = home / "dense-ours", tmp_path / "out"

    def refused(*words):
        ((status, said),) = ranks(1, command, "export", *words)
        assert status == 2 and said.count("\n") == 1 and not out.exists(), said
        return said

    to = (ours, out, "--to", "megatron")
    assert "must divide the 4 experts" in refused(
        home / "moe-ours", out, "--to", "megatron", "--expert-parallel", 3
    )
    assert "this one has none" in refused(*to, "--expert-parallel", 2)
    assert "go with --to huggingface" in refused(*to, "--check-tokens", 9)
    assert "go with --to megatron" in refused(ours, out, "--optimizer", "drop")
    done(ranks, "export", *to, "--optimizer", "drop")
    ((keys, arguments),) = ranks(1, described, out / f"iter_{ITERATION:07d}")
    assert arguments["no_save_optim"] and not [key for key in keys if "optimizer" in key]
    assert (out / "latest_checkpointed_iteration.txt").read_text() == f"{ITERATION}\n"


def described(folder):
    """Names of tensors, and the arguments, as megatron-core reads them."""
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder))
    return list(plain(folder)), vars(common["args"])


def other_tensors(first, second):
    """Names of tensors that two checkpoints of ours do not have alike, loads of experts aside."""
    import torch

    from megascale.checkpoint.read import read_piece
    from megascale.checkpoint.storage import read_index

    indices = [(folder, read_index(folder)) for folder in (first, second)]
    keys = {key for _, index in indices for key in index.tensors if not key.endswith("_E")}

    def read(folder, index, key):
        size = tuple(index.tensors[key].size)
        return read_piece(folder, index, key, (0,) * len(size), size)

    return [k for k in keys if not torch.equal(*(read(*one, k) for one in indices))]


def test_a_run_comes_back_with_its_optimizer(ranks, corpus, tmp_path):  # noqa: F811
    overrides = ("model.moe.num_experts=4", "train.precision=bf16", "train.tokens=5000")
    run = trained(ranks, 1, corpus, tmp_path, *overrides)
    (folder,) = (path for path in (run / "checkpoints").iterdir() if path.is_dir())
    said = done(ranks, "export", run, tmp_path / "out", "--to", "megatron")
    assert "AdamW after 5 steps; lr = 0.001" in said, said
    done(ranks, "import", tmp_path / "out", tmp_path / "back", "--vocab-size", 257)
    assert ranks(1, other_tensors, folder, tmp_path / "back") == [[]]
