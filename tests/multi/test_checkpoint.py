"""Checkpoints on real ranks: exact bits, every layout into every other, damage, full disks."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megascale.errors import UserError

MODEL = """
model: {num_layers: 2, hidden_size: 32, num_heads: 2, vocab_size: 100, vocab_multiple: 8}
data: {sources: {a: {path: unused}}, context_tokens: 32}
train: {precision: fp32}
device: cpu
"""
MOE = "model.moe.num_experts=4"


class Run:
    """A small model on this rank, trained on the same tokens whatever the layout."""

    def __init__(self, overrides: list[str], seed: int = 1) -> None:
        from megascale.config import finalize, parse_config
        from megascale.model.build import build_model
        from megascale.optim.build import build_optimizer
        from megascale.runtime import distributed
        from megascale.training.step import Learner

        config = parse_config(MODEL, [f"seed={seed}", *overrides])
        self.config = finalize(config, {"a": 1000}, 100)
        self.ranks = distributed.start(self.config)
        self.model = build_model(self.config, self.ranks)
        self.optimizer = build_optimizer(self.config, self.model)
        self.learner = Learner(self.config, self.ranks, self.model, self.optimizer)

    def train(self, steps: range) -> list[float]:
        """Losses of the steps with these numbers."""
        import numpy as np

        from megascale.mesh.packing import TokenSequence, pack
        from megascale.training.step import train_step

        losses = []
        for step in steps:
            tokens = np.random.default_rng(step).integers(0, 100, (4, 17))
            bag = [TokenSequence(row[:-1], row[1:]) for row in tokens]
            mine = bag[self.ranks.hdp_rank :: self.ranks.layout.hdp]
            tensor = self.ranks.layout.tensor
            batches = [pack([one], 100, tensor, self.ranks.device) for one in mine]
            losses.append(train_step(self.learner, batches, len(batches), 64, 64 * step).loss)
        return losses

    def saver(self, folder: str, **options: Any) -> Any:
        """A saver for this run; synchronous unless told otherwise."""
        from dataclasses import replace

        from megascale.checkpoint.save import Saver

        options = {"async_save": False} | options
        return Saver(folder, replace(self.config.checkpoint, **options), self.ranks)

    def save(self, saver: Any, step: int) -> Any:
        """Save; the results that ended in it."""
        from megascale.checkpoint.manifest import Position

        position = Position(step, 64 * step, 1, "a: 1\n", {"consumed": {"a": step}})
        return saver.save(position, self.model, self.optimizer)

    def load(self, folder: str, with_optimizer: bool = True) -> Any:
        """Load the latest; its manifest."""
        from megascale.checkpoint.load import find, restore

        found = find(folder, "latest", self.ranks)
        assert found is not None
        optimizer = self.optimizer if with_optimizer else None
        return restore(found, self.model, optimizer, self.ranks)

    def state(self) -> dict[str, Any]:
        """Every global tensor by name, put together from what all ranks hold (on rank 0).

        Fails where replicas differ.
        """
        import torch
        import torch.distributed as dist

        from megascale.checkpoint.boxes import boxes

        self.optimizer.set_steps(self.optimizer.steps)
        mine = [
            (box.key, box.global_shape, box.offset, box.live().clone())
            for box in boxes(self.model, self.optimizer)
        ]
        told: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(told, mine)
        whole: dict[str, Any] = {}
        for key, shape, offset, part in (entry for of_rank in told for entry in of_rank):
            into = whole.setdefault(key, torch.full(shape, float("nan"), dtype=part.dtype))
            place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
            before = into[place]
            assert torch.equal(part[~before.isnan()], before[~before.isnan()]), f"{key} differs"
            into[place] = part
        assert not any(tensor.isnan().any() for tensor in whole.values())
        return whole


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two states hold the same tensors, bit by bit."""
    import torch

    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def trained_and_saved(folder: str, overrides: list[str], follow: range) -> Any:
    """Train two steps and save; the state then, and the losses of the steps in `follow`."""
    run = Run(overrides)
    run.train(range(2))
    (result,) = run.save(run.saver(folder), 2)
    assert result.error is None and result.last_good == 2, result
    state = run.state()
    return state, run.train(follow)


def loaded(folder: str, overrides: list[str], follow: range) -> Any:
    """Load into a model of other initial weights; its state, and the losses after."""
    run = Run(overrides, seed=2)
    manifest = run.load(folder)
    assert manifest.position.cursor == {"consumed": {"a": 2}} and manifest.optimizer_steps == 2
    state = run.state()
    return state, run.train(follow)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.precision=bf16"],
        ["train.precision=bf16", "parallel.tensor=2"],
        ["train.precision=bf16", "optim.distributed_optimizer=false"],
        [MOE, "parallel.expert=2"],
        ["optim.name=soap", "train.precision=bf16", "optim.distributed_optimizer=false"],
        ["optim.name=soap", MOE, "parallel.expert=2", "train.precision=bf16"],
        ["optim.name=soap", "parallel.tensor=2"],
    ],
    ids=lambda overrides: " ".join(overrides) or "fp32",
)
def test_the_same_layout_gives_the_same_bits(
    ranks: Any, tmp_path: Path, overrides: list[str]
) -> None:
    follow = range(2, 4)
    saved, losses = ranks(2, trained_and_saved, str(tmp_path), overrides, follow)[0]
    found, losses_after = ranks(2, loaded, str(tmp_path), overrides, follow)[0]
    assert same(saved, found) and len(saved) > 10
    assert losses == losses_after


def saved_with_gathers_that_overlap(folder: str, overrides: list[str], follow: range) -> Any:
    """As `trained_and_saved`, where the forward pass gathers the weights, as it may on CUDA."""
    from dataclasses import replace

    from megascale.model import build

    plain = build._reduction

    def overlapping(*given: Any) -> Any:
        return replace(plain(*given), overlap_grad_reduce=True, overlap_param_gather=True)

    with patch.object(build, "_reduction", overlapping):
        return trained_and_saved(folder, overrides, follow)


@pytest.mark.parametrize("overrides", [["planner.name=longest_first"], ["train.precision=bf16"]])
def test_a_save_has_the_weights_after_the_last_step(
    ranks: Any, tmp_path: Path, overrides: list[str]
) -> None:
    follow = range(2, 4)
    expected = ranks(2, trained_and_saved, str(tmp_path / "plain"), overrides, follow)[0]
    overlapped = ranks(
        2, saved_with_gathers_that_overlap, str(tmp_path / "overlap"), overrides, follow
    )[0]
    found = ranks(2, loaded, str(tmp_path / "overlap"), overrides, follow)[0]
    for state, losses in (overlapped, found):
        assert same(state, expected[0]) and losses == expected[1]


class Reader:
    """A copy on its way, which sees the weights when the step waits for it."""

    def __init__(self, run: Run) -> None:
        self.run, self.seen = run, []

    def wait(self) -> None:
        self.seen.append(self.run.state())


def step_that_waits() -> Any:
    """The state before a step, when the step waits for a copy, and after it."""
    run = Run(["train.precision=bf16"])
    run.train(range(1))
    before, reader = run.state(), Reader(run)
    run.optimizer.readers.append(reader)
    run.train(range(1, 3))
    return before, reader.seen, run.state()


def test_an_update_waits_for_a_copy_to_host(ranks: Any) -> None:
    before, (seen,), after = ranks(1, step_that_waits)[0]
    assert same(before, seen) and not same(before, after)


TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
EXPERT, REPLICATED = "parallel.expert=2", "optim.distributed_optimizer=false"
SOAP = "optim.name=soap"
UNPADDED, WIDE = "model.vocab_multiple=1", "model.vocab_multiple=128"
BF16, UNTIED = "train.precision=bf16", "model.tied_embeddings=false"


@pytest.mark.parametrize(
    "common, before, after",
    [
        ([], (2, [TENSOR]), (1, [])),
        (["model.qkv_bias=true"], (2, [TENSOR]), (1, [])),
        ([BF16, "model.num_kv_heads=2"], (1, []), (2, [TENSOR])),
        ([], (2, [PIPELINE]), (1, [])),
        ([BF16, UNTIED], (1, []), (2, [PIPELINE])),
        ([], (2, []), (1, [])),
        ([BF16], (1, []), (2, [])),
        ([MOE], (2, [EXPERT]), (1, [])),
        ([MOE, BF16], (1, []), (2, [EXPERT])),
        ([], (2, []), (2, [REPLICATED])),
        ([BF16], (2, [REPLICATED]), (2, [])),
        ([MOE, BF16], (2, [EXPERT]), (2, [PIPELINE, REPLICATED])),
        ([], (2, [TENSOR, REPLICATED]), (2, [PIPELINE])),
        ([BF16], (2, []), (3, [])),
        ([BF16], (4, [TENSOR, PIPELINE]), (2, [])),
        ([MOE], (2, [PIPELINE]), (4, [EXPERT, PIPELINE])),
        # 100 ids in 100, 102, 104, 128 or 384 rows, and tensor ranks of nothing but padding
        ([], (1, [UNPADDED]), (2, [TENSOR, "model.vocab_multiple=3"])),
        ([UNTIED, "model.num_heads=4"], (2, [TENSOR, UNPADDED]), (4, ["parallel.tensor=4", WIDE])),
        ([BF16], (4, ["parallel.tensor=2", WIDE]), (3, [UNPADDED])),
        ([BF16, UNTIED], (2, [PIPELINE, REPLICATED, WIDE]), (2, [TENSOR])),
        ([MOE], (2, [EXPERT, WIDE]), (4, [EXPERT, TENSOR])),
        ([SOAP, "optim.soap_max_dim=99"], (2, [WIDE]), (1, [UNPADDED])),
        ([SOAP, BF16], (2, [REPLICATED]), (3, [])),
        ([SOAP, MOE, BF16], (2, [EXPERT]), (2, [PIPELINE])),
        ([SOAP, TENSOR], (2, []), (4, [PIPELINE])),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, (list, tuple)) else None,
)
def test_any_layout_loads_into_any_other(
    ranks: Any,
    tmp_path: Path,
    common: list[str],
    before: tuple[int, list[str]],
    after: tuple[int, list[str]],
) -> None:
    follow = range(2, 4)
    saved, losses = ranks(
        before[0], trained_and_saved, str(tmp_path), [*common, *before[1]], follow
    )[0]
    found, losses_after = ranks(after[0], loaded, str(tmp_path), [*common, *after[1]], follow)[0]
    assert same(saved, found)
    assert losses_after == pytest.approx(losses, rel=5e-3 if BF16 in common else 1e-5)


@pytest.mark.parametrize(
    "before, after",
    [((2, [WIDE]), (1, [UNPADDED])), ((1, [UNPADDED]), (2, [REPLICATED, WIDE]))],
    ids=["fewer rows", "more rows"],
)
def test_soap_goes_on_with_other_padding(
    ranks: Any, tmp_path: Path, before: tuple[int, list[str]], after: tuple[int, list[str]]
) -> None:
    """Its bases over the rows of the vocabulary are those of the ids; the rest is as it was."""
    import torch

    follow, key = range(2, 4), "embedding.word_embeddings.weight"
    saved, losses = ranks(before[0], trained_and_saved, str(tmp_path), [SOAP, *before[1]], follow)[
        0
    ]
    found, losses_after = ranks(after[0], loaded, str(tmp_path), [SOAP, *after[1]], follow)[0]
    assert losses_after == pytest.approx(losses, rel=1e-3)
    state = {}
    for name in ("exp_avg", "exp_avg_sq", "left_average", "left_basis"):
        was, now = (one.pop(f"optimizer.state.{name}.{key}") for one in (saved, found))
        assert sorted((was.shape[-2], now.shape[-2])) == [100, 128]
        state[name] = was.view(was.shape[-2:]), now.view(now.shape[-2:])
    assert same(saved, found)
    means = [basis @ mean for basis, mean in zip(state["left_basis"], state["exp_avg"])]
    torch.testing.assert_close(means[1][:100], means[0][:100], rtol=1e-4, atol=1e-7)
    assert means[0].any() and not means[1][100:].any()
    was, now = state["left_average"]
    assert now[:100, :100].equal(was[:100, :100]) and not now[100:].any()
    assert state["exp_avg_sq"][1].min() >= 0 and state["exp_avg_sq"][1].any()


def initial_state(overrides: list[str]) -> Any:
    """The state that initialisation by name gives, which is the same in all layouts."""
    return {
        key: tensor
        for key, tensor in Run(overrides).state().items()
        if not key.startswith("optimizer.")
    }


@pytest.mark.parametrize("cut", [[TENSOR], [PIPELINE], [EXPERT]], ids=str)
def test_boxes_lie_where_the_names_say(ranks: Any, cut: list[str]) -> None:
    """Weights are drawn by global name and offset, so a misplaced box shows here."""
    whole = ranks(1, initial_state, [MOE])[0]
    assert same(whole, ranks(2, initial_state, [MOE, *cut])[0])


def through_megatron(folder: str) -> bool:
    """Load the weights with megatron-core's own `dist_checkpointing.load`."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    run = Run([], seed=2)
    wanted = run.model.chunks[0].module.sharded_state_dict()
    wanted = {k: v for k, v in wanted.items() if not isinstance(v, ShardedObject)}
    assert list(nested_values(wanted))
    at = next((Path(folder) / "checkpoints").glob("0*"))
    given = dist_checkpointing.load(wanted, str(at))
    run.load(folder)
    theirs = {key: given[key] for key in wanted}
    live = run.model.chunks[0].module.state_dict()
    return all(torch.equal(theirs[key], live[key]) for key in wanted)


def test_megatron_core_reads_it(ranks: Any, tmp_path: Path) -> None:
    ranks(2, trained_and_saved, str(tmp_path), [TENSOR], range(0))
    assert ranks(1, through_megatron, str(tmp_path))[0]


def weights_only(folder: str) -> Any:
    """Load without an optimizer, then hand the weights to one."""
    run = Run([BF16], seed=2)
    before = run.state()
    run.load(folder, with_optimizer=False)
    after = run.state()
    run.optimizer.core.reload_model_params()
    reloaded = run.state()
    return before, after, reloaded


def test_weights_alone(ranks: Any, tmp_path: Path) -> None:
    saved, _ = ranks(2, trained_and_saved, str(tmp_path), [BF16], range(0))[0]
    before, after, reloaded = ranks(1, weights_only, str(tmp_path))[0]
    for key in before:
        assert after[key].equal((before if key.startswith("optimizer.") else saved)[key])
        if key.startswith("optimizer.state.fp32_param."):
            weight = reloaded[key.removeprefix("optimizer.state.fp32_param.")]
            assert reloaded[key].equal(weight.float())


def bytes_read(folder: str, overrides: list[str]) -> tuple[int, dict[str, int]]:
    """(bytes this rank read in a load, bytes of the global tensors of its boxes)."""
    import math

    from megascale.checkpoint import read
    from megascale.checkpoint.boxes import boxes

    run = Run(overrides, seed=2)
    honest, taken = read._read, []

    def counting(folder: Any, index: Any, plan: Any, wanted: list[Any]) -> None:
        taken.extend(box.live().nbytes for box in wanted)
        honest(folder, index, plan, wanted)

    read._read = counting
    try:
        run.load(folder)
    finally:
        read._read = honest
    run.optimizer.set_steps(run.optimizer.steps)
    mine = boxes(run.model, run.optimizer)
    whole = {box.key: math.prod(box.global_shape) * box.live().element_size() for box in mine}
    return sum(taken), whole


@pytest.mark.parametrize(
    "world, overrides",
    [
        (3, []),
        (3, ["optim.distributed_optimizer=false"]),
        (4, [MOE, "parallel.expert=2"]),
        (4, [TENSOR, "train.precision=bf16"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_replicas_are_read_once(
    ranks: Any, tmp_path: Path, world: int, overrides: list[str]
) -> None:
    """Ranks that hold the same read it once between them, in parts of about the same size."""
    saved, after = ranks(2, trained_and_saved, str(tmp_path), overrides, range(2, 4))[0]
    told = ranks(world, bytes_read, str(tmp_path), overrides)
    whole = sum(dict(kv for _, tensors in told for kv in tensors.items()).values())
    tensor_copies = 2 if TENSOR in overrides else 1  # norms are on every tensor rank
    assert whole <= sum(read for read, _ in told) <= 1.1 * tensor_copies * whole
    assert max(read for read, _ in told) <= 1.3 * sum(read for read, _ in told) / world
    state, losses = ranks(world, loaded, str(tmp_path), overrides, range(2, 4))[0]
    assert same(saved, state)


def refused(folder: str, overrides: list[str]) -> str:
    """The line that loading is refused with."""
    run = Run(overrides)
    with pytest.raises(UserError) as caught:
        run.load(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["model.hidden_size=64"], "decoder.final_layernorm.weight is 32 float32 there and 64 f"),
        ([UNTIED], "tensor output_layer.weight is absent there and 100x32 float32 here"),
        (["model.qk_norm=true"], "layers.self_attention.k_layernorm.weight is absent there"),
        ([BF16], "final_layernorm.weight is 32 float32 there and 32 bfloat16 here"),
        (["model.num_layers=4"], "2x32 float32 there and 4x32 float32 here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_model_is_refused(
    ranks: Any, tmp_path: Path, overrides: list[str], says: str
) -> None:
    ranks(1, trained_and_saved, str(tmp_path), [], range(0))
    told = ranks(2, refused, str(tmp_path), overrides)
    assert says in told[0] and "\n" not in told[0]
    assert told[0] == told[1]


class Evil:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file and make the manifest agree, as a forger would."""
    from megascale.checkpoint.manifest import sum_file

    (checkpoint / name).write_bytes(content)
    document = json.loads((checkpoint / "manifest.json").read_bytes())
    document["files"][name] = vars(sum_file(checkpoint / name))
    (checkpoint / "manifest.json").write_text(json.dumps(document))


def forge_tensor(checkpoint: Path, mark: Path) -> None:
    """Put a pickle with code where the first tensor is."""
    import io

    import torch

    from megascale.checkpoint.storage import read_index

    payload = io.BytesIO()
    torch.save(Evil(mark), payload)
    metadata = read_index(checkpoint).metadata
    place = next(iter(metadata.storage_data.values()))
    place.offset, place.length = 0, len(payload.getvalue())
    forge(checkpoint, place.relative_path, payload.getvalue())
    forge(checkpoint, ".metadata", pickle.dumps(metadata))


@pytest.mark.parametrize("where", ["metadata", "hidden in metadata", "tensor", "not a pickle"])
def test_no_pickled_code_is_executed(ranks: Any, tmp_path: Path, where: str) -> None:
    ranks(1, trained_and_saved, str(tmp_path), [], range(0))
    (checkpoint,) = (tmp_path / "checkpoints").glob("0*")
    mark = tmp_path / "mark"
    if where == "metadata":
        forge(checkpoint, ".metadata", pickle.dumps(Evil(mark)))
    elif where == "hidden in metadata":
        from megascale.checkpoint.storage import read_index

        metadata = read_index(checkpoint).metadata
        metadata.planner_data = Evil(mark)
        forge(checkpoint, ".metadata", pickle.dumps(metadata))
    elif where == "tensor":
        forge_tensor(checkpoint, mark)
    else:
        forge(checkpoint, ".metadata", b"\x80\x05\x95")
    told = ranks(2, refused, str(tmp_path), [])
    assert "is refused" in told[0] and "\n" not in told[0] and told[0] == told[1]
    assert not mark.exists()


def saved_thrice(folder: str) -> Any:
    """Three checkpoints; the state at each."""
    run = Run([])
    saver = run.saver(folder, keep_last=3)
    states = []
    for step in range(1, 4):
        run.train(range(step - 1, step))
        run.save(saver, step)
        states.append(run.state())
    return states


def load_with_warnings(folder: str) -> Any:
    """The warnings and the state that a resume gets."""
    from megascale.checkpoint.load import find, restore

    run = Run([], seed=2)
    found = find(folder, "auto", run.ranks)
    assert found is not None
    restore(found, run.model, run.optimizer, run.ranks)
    return found.warnings, run.state()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    ranks: Any, tmp_path: Path
) -> None:
    states = ranks(2, saved_thrice, str(tmp_path))[0]
    checkpoints = tmp_path / "checkpoints"
    victim = checkpoints / "00000003" / "__1_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    told = ranks(2, load_with_warnings, str(tmp_path))
    for warnings, state in told:
        assert len(warnings) == 1 and "00000003 is damaged: __1_0.distcp: its che" in warnings[0]
        assert same(state, states[1])
    (checkpoints / "00000002" / "__0_0.distcp").unlink()
    (checkpoints / ".tmp-00000004").mkdir()
    warnings, state = ranks(1, load_with_warnings, str(tmp_path))[0]
    assert len(warnings) == 2 and "__0_0.distcp: missing" in warnings[1]
    assert same(state, states[0])


def found_damage(folder: str, damages: list[tuple[str, str]]) -> list[str]:
    """What this rank says of the checkpoint with one file damaged, for each of `damages`.

    `-` stands for a checkpoint that is found to be good.
    """
    import torch.distributed as dist

    from megascale.checkpoint.load import find_at

    run, told = Run([]), []
    for name, how in damages:
        path = Path(folder) / name
        content = path.read_bytes()
        dist.barrier()
        if run.ranks.rank == 0:
            path.write_bytes(damaged(content, how))
        dist.barrier()
        try:
            find_at(folder, run.ranks)
            told.append("-")
        except UserError as error:
            told.append(str(error))
        dist.barrier()
        if run.ranks.rank == 0:
            path.write_bytes(content)
        dist.barrier()
    find_at(folder, run.ranks)  # it is good again
    return told


def damaged(content: bytes, how: str) -> bytes:
    """`content` with one bit turned at its begin, middle or end, or without its last byte."""
    if how == "cut":
        return content[:-1]
    place = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[how]
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_damage_of_any_file_is_found_on_any_number_of_ranks(
    ranks: Any, tmp_path: Path, world: int
) -> None:
    """The files are shared out to be verified, and none is left out."""
    ranks(2, saved_thrice, str(tmp_path))
    folder = tmp_path / "checkpoints" / "00000003"
    names = sorted(set(json.loads((folder / "manifest.json").read_bytes())["files"]))
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "metadata.json"]
    damages = [(name, how) for name in names for how in ("first", "middle", "last", "cut")]
    for told in ranks(world, found_damage, str(folder), damages):
        for (name, how), said in zip(damages, told, strict=True):
            what = "bytes where the manifest says" if how == "cut" else "its checksum differs"
            assert f"00000003 is damaged: {name}: " in said and what in said, (name, how)


def order_of_a_save(folder: str) -> list[tuple[str, str]]:
    """What this rank makes survive a power cut, and what it renames, in order."""
    checkpoints, done = Path(folder).resolve() / "checkpoints", []
    run = Run([])
    saver = run.saver(folder)

    def noting(name: str) -> Any:
        honest = getattr(os, name)

        def noted(first: Any, *others: Any) -> Any:
            path = f"/proc/self/fd/{first}" if name == "fsync" else first
            place = Path(os.path.realpath(path)).relative_to(checkpoints)
            honest(first, *others)
            done.append((name, re.sub(r"\.tmp-(\D.*)-[0-9a-f]{16}$", r".tmp-\1", str(place))))

        return patch.object(os, name, noted)

    with noting("fsync"), noting("rename"), noting("replace"):
        assert [result.error for result in run.save(saver, 1)] == [None]
    return done


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are in Linux's /proc")
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_latest_follows(
    ranks: Any, tmp_path: Path
) -> None:
    """Cut off anywhere between two of these, the disk holds the old state or the new one."""
    first, second = ranks(2, order_of_a_save, str(tmp_path))
    assert second == [("fsync", ".tmp-00000001/__1_0.distcp")]
    files = [".tmp-.metadata", ".tmp-metadata.json", ".tmp-common.pt", ".tmp-manifest.json"]
    assert first == [
        ("fsync", ".tmp-00000001/__0_0.distcp"),
        *((what, f".tmp-00000001/{name}") for name in files for what in ("fsync", "replace")),
        ("fsync", ".tmp-00000001"),
        ("rename", ".tmp-00000001"),
        ("fsync", "."),
        ("fsync", ".tmp-latest"),
        ("replace", ".tmp-latest"),
        ("fsync", "."),
    ]


def kept(folder: str, keep_last: int, keep_every_steps: int) -> None:
    """Save at steps 1 to 6."""
    run = Run([])
    saver = run.saver(folder, keep_last=keep_last, keep_every_steps=keep_every_steps)
    for step in range(1, 7):
        run.save(saver, step)


def test_old_checkpoints_go(ranks: Any, tmp_path: Path) -> None:
    ranks(2, kept, str(tmp_path), 2, 3)
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000003", "00000005", "00000006", "latest"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "00000006\n"


def trains_on_while_writing(folder: str) -> Any:
    """Hold the background write back, train on, let go: what was saved is the state at the save."""
    from megascale.checkpoint import save as module

    run = Run([BF16])
    run.train(range(2))
    state = run.state()
    saver = run.saver(folder, async_save=True)
    saver.prepare(run.model, run.optimizer)
    release, write = threading.Event(), module.write_tensors

    def held_back(*args: Any) -> Any:
        assert release.wait(250)
        return write(*args)

    module.write_tensors = held_back
    try:
        assert run.save(saver, 2) == []  # though nothing is written before `release`
        run.train(range(2, 4))
        assert saver.pending and not saver.pending_done()
        assert not (Path(folder) / "checkpoints" / "00000002").exists()
        release.set()
        result = saver.wait()
    finally:
        module.write_tensors = write
    assert result.error is None and not saver.pending and saver.pending_done()
    return state


def test_an_asynchronous_save_lets_training_go_on(ranks: Any, tmp_path: Path) -> None:
    state = ranks(2, trains_on_while_writing, str(tmp_path))[0]
    warnings, found = ranks(1, _loaded_bf16, str(tmp_path))[0]
    assert warnings == () and same(state, found)


def _loaded_bf16(folder: str) -> Any:
    state, _ = loaded(folder, [BF16], range(0))
    return (), state


def polled(folder: str) -> list[int]:
    """Saves ended by the step loop's own poll; a second save waits for the first."""
    import torch
    import torch.distributed as dist

    run = Run([])
    saver = run.saver(folder, async_save=True)
    assert run.save(saver, 1) == []
    ended = [result.step for result in run.save(saver, 2)]
    while saver.pending:
        waiting = torch.tensor([0.0 if saver.pending_done() else 1.0])
        dist.all_reduce(waiting)
        if not waiting:
            result = saver.finalize()
            ended += [result.step] if result else []
    assert saver.finalize() is None and saver.wait() is None
    return ended


def test_the_step_loop_ends_a_save(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, polled, str(tmp_path)) == [[1, 2], [1, 2]]


def fails_on_rank_1(folder: str, asynchronous: bool) -> Any:
    """A disk that is full on one rank only, between two good saves."""
    import torch.distributed as dist

    from megascale.checkpoint import save as module

    run = Run([])
    saver = run.saver(folder, async_save=asynchronous)

    def full(path: Path, rank: int, tensors: Any) -> Any:
        if rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, rank, tensors)

    write = module.write_tensors
    told = run.save(saver, 1) + [saver.wait()]
    module.write_tensors = full
    try:
        told += run.save(saver, 2) + [saver.wait()]
    finally:
        module.write_tensors = write
    left = sorted(entry.name for entry in (Path(folder) / "checkpoints").iterdir())
    dist.barrier()
    told += run.save(saver, 3) + [saver.wait()]
    run.train(range(1))
    return [str(result) for result in told if result], left


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_keeps_the_last_good_checkpoint(
    ranks: Any, tmp_path: Path, asynchronous: bool
) -> None:
    for told, left in ranks(2, fails_on_rank_1, str(tmp_path), asynchronous):
        assert told[1] == (
            "checkpoint at step 2 failed: rank 1: No space left on device; last good is 1"
        )
        assert told[0].startswith("checkpoint at step 1: ") and "step 3: " in told[2]
        assert left == ["00000001", "latest"]


def saves_where_the_folder_is_gone(folder: str) -> list[str]:
    """A mount that is lost after a good save."""
    run = Run([])
    saver = run.saver(folder)
    run.save(saver, 1)
    saver.wait()
    (Path(folder) / "checkpoints").rename(Path(folder) / "gone")
    (Path(folder) / "checkpoints").write_text("in the way")
    told = run.save(saver, 2) + [saver.wait()]
    run.train(range(1))
    return [str(result) for result in told if result]


def test_a_save_where_the_folder_is_gone_names_it(ranks: Any, tmp_path: Path) -> None:
    (told,) = ranks(1, saves_where_the_folder_is_gone, str(tmp_path))[0]
    assert f"{tmp_path}/checkpoints/.tmp-00000002: Not a directory; last good is 1" in told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    mounted = shutil.which("mount") and subprocess.run(["mount", *options], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("a full disk is not tested: mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fills_the_disk(folder: str) -> Any:
    """Save until the file system is full."""
    run = Run([])
    saver = run.saver(folder, keep_last=9)
    told = []
    for step in range(1, 12):
        told += run.save(saver, step)
        if told[-1].error:
            break
    run.train(range(1))
    return told


def test_a_full_disk(ranks: Any, small_disk: Path) -> None:
    told = ranks(2, fills_the_disk, str(small_disk))[0]
    assert "No space left on device" in str(told[-1]) and told[-1].last_good == len(told) - 1
    names = sorted(entry.name for entry in (small_disk / "checkpoints").iterdir())
    assert names == [*(f"{step:08d}" for step in range(1, len(told))), "latest"]
    warnings, _ = ranks(2, load_with_warnings, str(small_disk))[0]
    assert warnings == ()
