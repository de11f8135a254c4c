"""Megatron checkpoints of every version and kind of folder, and one larger than memory."""

import pickle
from argparse import Namespace

import pytest
import torch
from memory_limit import limit_memory, on_linux, run_python
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megascale.checkpoint.manifest import Position
from megascale.checkpoint.tensors import Piece, write_checkpoint
from megascale.config import ModelConfig, RunConfig
from megascale.config.complete import complete
from megascale.convert.megatron.read import Foreign
from megascale.convert.megatron.source import is_megatron
from megascale.convert.megatron.tensors import tensors_of
from megascale.errors import UserError

SHAPE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24}
BRIDGE = {
    "model": {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **SHAPE,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_partial_": True},
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
        "seq_length": 64,
        "layernorm_epsilon": 1e-6,
    }
}


def pieces(model, states=("",), dtype=torch.float32):
    """Random tensors of a model, a layer at a time, under megatron-core's names."""
    for tensor in tensors_of(model):
        for place in tensor.places():
            shape = (1,) * len(place) + tensor.shape
            offset = place + (0,) * len(tensor.shape)
            for state in states:
                key = f"optimizer.state.{state}.{tensor.key}" if state else tensor.key
                yield Piece(key, tensor.size, offset, torch.randn(shape).to(dtype))


def written(folder, common, states=("",), dtype=torch.float32, **shape):
    """A folder as megatron-core writes it; `common` is what it saves beside the tensors."""
    options = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24, **shape}
    model = complete(RunConfig(model=ModelConfig(vocab_size=64, **options))).model
    write_checkpoint(folder, pieces(model, states, dtype), Position(0, 0, 1, "", {}))
    (folder / "manifest.json").unlink()
    torch.save(common, folder / "common.pt")
    return folder


def arguments(**options):
    return Namespace(**{**SHAPE, "swiglu": True, "seq_length": 32, **options})


def test_common_state_may_stand_among_the_tensors(tmp_path):
    common = {"args": arguments(consumed_train_samples=5), "iteration": 9}
    folder = written(tmp_path / "new", {})
    (folder / "common.pt").unlink()
    with (folder / "__1_0.distcp").open("wb") as file:
        file.write(b"before")
        torch.save(common, file)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    size = (folder / "__1_0.distcp").stat().st_size - 6
    key = "common_state/shard_0_1"
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__1_0.distcp", 6, size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    foreign = Foreign.open(folder, 64)
    assert (foreign.progress.iteration, foreign.tokens) == (9, 5 * 32)


def test_megatron_bridge_has_options_and_progress_in_files_of_its_own(tmp_path):
    import yaml

    folder = written(tmp_path / "bridge", {"iteration": 1})
    (folder / "run_config.yaml").write_text(yaml.safe_dump(BRIDGE))
    steps = {"step": torch.tensor(4, dtype=torch.int32), "consumed_train_samples": torch.tensor(8)}
    torch.save(steps, folder / "train_state.pt")
    foreign = Foreign.open(folder, 64)
    assert is_megatron(folder) and foreign.model.norm_eps == 1e-6
    assert (foreign.progress.iteration, foreign.tokens) == (4, 8 * 64)
    assert "rotary_base (taken: 10000.0)" in foreign.unknown


def test_a_run_that_starts_from_one_is_sent_to_import(tmp_path):
    from megascale.checkpoint.load import read_manifest

    folder = written(tmp_path / "theirs" / "iter_0000001", {"args": arguments()})
    with pytest.raises(UserError, match="if Megatron wrote it: megascale import"):
        read_manifest(folder)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(UserError, match="is a checkpoint of Megatron; megascale import makes"):
        read_manifest(folder.parent)


def test_options_by_hand_win(tmp_path):
    folder = written(tmp_path / "theirs", {"args": arguments(rotary_base=1000)})
    by_hand = {"rotary_base": 5e5, "use_rope_scaling": True, "window_size": [15, 0]}
    model = Foreign.open(folder, 64, by_hand, "x.yaml").model
    assert (model.rope_base, model.sliding_window) == (5e5, 16)
    assert model.rope_scaling is not None and model.rope_scaling.factor == 8.0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"activation_func": "torch.nn.functional.gelu"}, "gelu is not built"),
        ({"window_size": (3, 3)}, "only \\(N, 0\\) is"),
        ({"num_experts": 4}, "router.weight, layer 0 is missing"),
        ({"untie_embeddings_and_output_weights": True}, "output_layer.weight is missing"),
    ],
)
def test_what_tensors_contradict_is_refused(tmp_path, options, words):
    folder = written(tmp_path / "theirs", {"args": arguments(**options)})
    with pytest.raises(UserError, match=words):
        Foreign.open(folder, 64)


@pytest.mark.parametrize(
    "states, kind, words",
    [
        (("", "exp_avg"), "fully_reshardable", "the optimizer keeps exp_avg, and AdamW keeps"),
        (("", "exp_avg", "exp_avg_sq"), "dp_reshardable", "fully-reshardable, or: --optimizer"),
    ],
)
def test_state_of_other_kinds_is_refused_by_name(tmp_path, states, kind, words):
    common = {"args": arguments(), "optimizer": {"param_state_sharding_type": kind}}
    folder = written(tmp_path / "theirs", common, states)
    with pytest.raises(UserError, match=words):
        Foreign.open(folder, 64)
    assert Foreign.open(folder, 64, keeps_optimizer=False).adam is None


def test_types_that_are_not_read_are_named(tmp_path):
    folder = written(tmp_path / "theirs", {"args": arguments()}, dtype=torch.float64)
    with pytest.raises(UserError, match="is of type float64; float32, bfloat16"):
        Foreign.open(folder, 64)
    folder = written(tmp_path / "half", {"args": arguments()}, dtype=torch.float16)
    assert Foreign.open(folder, 64).dtype == torch.float32


def import_within(folder):
    """Import checkpoint `large` of `folder` with a quarter of its size as memory."""
    from pathlib import Path

    from megascale.checkpoint.tensors import fill_checkpoint

    folder = Path(folder)
    states = ("", "param", "exp_avg", "exp_avg_sq")
    optimizer = {"param_state_sharding_type": "fully_reshardable", "param_groups": [{"step": 3}]}

    def make(name, layers):
        common = {"args": arguments(num_layers=layers, hidden_size=128), "optimizer": optimizer}
        written(folder / name, common, states, num_layers=layers, hidden_size=128)

    def bring(name):
        foreign, out = Foreign.open(folder / name, 64), folder / f"{name}-out"
        out.mkdir()
        pieces = foreign.reader(foreign.dtype).pieces(foreign.model, foreign.boxes)
        fill_checkpoint(out, pieces, Position(0, 0, 1, "", {}), foreign.adam.steps)

    make("small", 1)
    bring("small")  # what is loaded once is no part of the checkpoint's memory
    make("large", 100)
    size = sum(file.stat().st_size for file in (folder / "large").iterdir())
    limit_memory(size // 4)
    bring("large")
    print(size, sum(file.stat().st_size for file in (folder / "large-out").iterdir()))


@on_linux
def test_an_import_of_four_times_the_memory_stays_below_it(tmp_path):
    code = "import sys, test_megatron_import as t; t.import_within(sys.argv[1])"
    before, after = map(int, run_python(code, tmp_path).split())
    assert before > 60_000_000 and after == pytest.approx(0.75 * before, rel=0.05)
