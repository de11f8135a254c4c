"""Reading boxes of global tensors out of a checkpoint, into live memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megascale.checkpoint.boxes import OPTIMIZER_PREFIX, Box
from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.repad import MASTER_PREFIX, fits, repadded
from megascale.checkpoint.storage import Index, one_line, read_index
from megascale.config.optimizers import OPTIMIZERS
from megascale.errors import UserError
from megascale.optim.optimizer_kind import StateTensors
from megascale.runtime.distributed import Ranks

Description = tuple[tuple[int, ...], torch.dtype | None]
ROUTER_STATE = ("router.load_E", "router.earlier_E", "router.bias_E")
"""Of the runs that trained them; a model that starts from another does without."""


def load_boxes(
    folder: Path,
    wanted: list[Box],
    state: StateTensors | None,
    ranks: Ranks,
    bring: Callable[[set[str]], None] | None = None,
) -> None:
    """Fill the live memory of `wanted` from a checkpoint of any layout.

    `state` is what the optimizer keeps; None where weights alone are wanted.
    `bring` is called, on all ranks, with the files of the folder that a rank is to read.
    Raises UserError on every rank when a tensor is missing, left over, of another shape or dtype,
    or when a file on any rank is refused.
    """
    index = _read_index_together(folder, ranks)
    stored = {
        key: tensor
        for key, tensor in _described(index).items()
        if state is not None or not key.startswith(OPTIMIZER_PREFIX)
    }
    asked = {box.key: (box.global_shape, box.holder().dtype) for box in wanted}
    _check_same_tensors(folder, stored, asked, state, ranks)
    _fill(folder, index, wanted, state, ranks, bring)


def load_other(folder: Path, wanted: list[Box], state: StateTensors | None, ranks: Ranks) -> None:
    """Fill the live memory of `wanted` from a checkpoint of another run.

    Unlike `load_boxes` it converts between precisions, takes master weights from the weights
    where there are none, leaves the state of routers as it is where the checkpoint has none, and
    without `state` leaves the optimizer's state in `wanted` alone. Raises UserError likewise.
    """
    index = _read_index_together(folder, ranks)
    wanted = [box for box in wanted if state is not None or not _is_state(box.key)]
    asked = {box.key: (box.global_shape, None) for box in wanted}
    stored = {key: (shape, None) for key, (shape, _) in _described(index).items()}

    def matters(key: str) -> bool:
        weight = not key.startswith(OPTIMIZER_PREFIX) and not key.endswith(ROUTER_STATE)
        return weight or (state is not None and _is_state(key))

    _check_same_tensors(
        folder,
        {key: stored[key] for key in stored if matters(key)},
        {key: asked[key] for key in asked if matters(key)},
        state,
        ranks,
    )
    masters = [box for box in wanted if box.key.startswith(MASTER_PREFIX)]
    others = [box for box in wanted if not box.key.startswith(MASTER_PREFIX)]
    for boxes in (others, masters):  # apart, because both may be read from the same tensor
        moved = [replace(box, key=_origin(box, index)) for box in boxes]
        _fill(folder, index, [box for box in moved if box.key in index.tensors], state, ranks)


def _is_state(key: str) -> bool:
    """Whether a tensor is of an optimizer, and no weight in another precision."""
    return key.startswith(OPTIMIZER_PREFIX) and not key.startswith(MASTER_PREFIX)


def _origin(box: Box, index: Index) -> str:
    """The tensor that holds what `box` is to hold, as exactly as the checkpoint knows it."""
    weight = box.key.removeprefix(MASTER_PREFIX)
    master = MASTER_PREFIX + weight
    exact = box.holder().dtype == torch.float32 and not box.key.endswith(ROUTER_STATE)
    if _is_state(box.key):
        return box.key
    return master if exact and master in index.tensors else weight


def _read_index_together(folder: Path, ranks: Ranks) -> Index:
    error: str | None = None
    try:
        index = read_index(folder)
    except UserError as refused:
        error = str(refused)
    _raise_together(error, ranks)
    return index


def _fill(
    folder: Path,
    index: Index,
    wanted: list[Box],
    state: StateTensors | None,
    ranks: Ranks,
    bring: Callable[[set[str]], None] | None = None,
) -> None:
    """Read boxes; one that all ranks of a group hold is read by one of them, who sends it on."""
    moved = repadded(index, wanted, state)
    apart = {id(box) for one in moved for box in one.live.values()}
    wanted = [box for box in wanted if id(box) not in apart]
    wanted += [box for one in moved for box in one.read.values()]
    shared = _shared(wanted, ranks)
    taken = {id(one.box) for one in shared}
    others = [box for box in wanted if id(box) not in taken]
    mine = others + [one.box for one in shared if one.reader == ranks.rank]
    error: str | None = None
    if bring is not None:
        bring(_files(index, mine))
    try:
        _read(folder, index, _plan(index, mine), mine)
    except UserError as refused:
        error = str(refused)
    _raise_together(error, ranks)
    for one in shared:
        dist.broadcast(one.box.live(), one.reader, group=one.group)
    for repadding in moved:
        repadding.write()


@dataclass(frozen=True)
class _Shared:
    """A box that all ranks of `group` want, and which of them reads it."""

    box: Box
    group: dist.ProcessGroup
    reader: int


def _shared(wanted: list[Box], ranks: Ranks) -> list[_Shared]:
    """In an order that all ranks of a group agree on, so that they broadcast in it."""
    shared: list[_Shared] = []
    for group in ranks.replicas:
        members = dist.get_process_group_ranks(group)
        if len(members) == 1:
            continue
        taken = {id(one.box) for one in shared}
        mine = {
            _digest(box): box
            for box in wanted
            if id(box) not in taken and box.live().device.type == ranks.device.type
        }
        told: list[Any] = [None] * len(members)
        dist.all_gather_object(told, list(mine), group=group)
        in_common = set(mine).intersection(*told)
        load = dict.fromkeys(members, 0)
        for digest in sorted(in_common, key=lambda one: (-mine[one].live().nbytes, one)):
            reader = min(members, key=lambda rank: (load[rank], rank))
            load[reader] += mine[digest].live().nbytes
            shared.append(_Shared(mine[digest], group, reader))
    return shared


def _digest(box: Box) -> int:
    return xxhash.xxh3_64_intdigest(repr((box.key, box.offset, box.shape)).encode())


def read_piece(folder: Path, index: Index, key: str, offset: Shape, shape: Shape) -> torch.Tensor:
    """A box of one tensor of a checkpoint, in host memory.

    Raises KeyError when there is no such tensor, and UserError when it has a hole there or its
    file is refused.
    """
    stored = index.tensors[key]
    piece = torch.empty(shape, dtype=stored.properties.dtype)
    wanted = [Box(key, tuple(stored.size), offset, shape, lambda: piece, 0)]
    _read(folder, index, _plan(index, wanted), wanted)
    return piece


def _read(folder: Path, index: Index, plan: LoadPlan, wanted: list[Box]) -> None:
    try:
        reader = FileSystemReader(folder)
        reader.set_up_storage_reader(index.metadata, is_coordinator=True)
        reader.read_data(plan, _IntoBoxes(wanted))
    except Exception as refused:  # a forged file can raise anything
        raise UserError(f"{folder} is refused: {one_line(refused)}") from None


class _IntoBoxes(DefaultLoadPlanner):
    """Gives the reader the live memory that each piece goes to."""

    def __init__(self, wanted: list[Box]) -> None:
        super().__init__()
        self._live = {(box.key, box.offset): box.live() for box in wanted}

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a box that `read_item` fills."""
        index = read_item.dest_index
        assert index.offset is not None
        live = self._live[(index.fqn, tuple(index.offset))]
        for axis, (start, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            live = live.narrow(axis, start, size)
        return live

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It was filled in place."""


def _plan(index: Index, wanted: list[Box]) -> LoadPlan:
    """What to read for the boxes that the checkpoint holds in full."""
    items: list[ReadItem] = []
    by_key: dict[str, list[Box]] = {}
    for box in wanted:
        by_key.setdefault(box.key, []).append(box)
    for key, boxes in by_key.items():
        stored = index.tensors.get(key)
        if stored is None or not fits(key, tuple(stored.size), boxes[0].global_shape):
            continue  # named, once for all ranks, by _check_same_tensors
        chunks = [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in boxes]
        found = create_read_items_for_chunk_list(key, stored, chunks)
        if sum(math.prod(item.lengths) for item in found) != sum(c.sizes.numel() for c in chunks):
            raise UserError(f"checkpoint tensor {key} has holes; take another checkpoint")
        items += found
    return LoadPlan(items)


def _files(index: Index, wanted: list[Box]) -> set[str]:
    """The files that hold boxes; none where the boxes are refused, which reading will say."""
    try:
        items = _plan(index, wanted).items
    except UserError:
        return set()
    return {index.metadata.storage_data[item.storage_index].relative_path for item in items}


def _described(index: Index) -> dict[str, Description]:
    return {key: (tuple(t.size), t.properties.dtype) for key, t in index.tensors.items()}


def _check_same_tensors(
    folder: Path,
    stored: Mapping[str, Description],
    mine: Mapping[str, Description],
    state: StateTensors | None,
    ranks: Ranks,
) -> None:
    """Raise UserError, naming the first tensor that the run and the checkpoint differ in."""
    asked: dict[str, Description] = {}
    for of_rank in _all_gather(dict(mine), ranks):
        asked |= of_rank
    keys = asked.keys() | stored.keys()
    for key in sorted(keys, key=lambda key: (key.startswith(OPTIMIZER_PREFIX), key)):
        if not _same(key, stored.get(key), asked.get(key), state):
            raise UserError(
                f"checkpoint {folder} does not fit this run: tensor {key} is "
                f"{_describe(stored.get(key))} there and {_describe(asked.get(key))} here; "
                f"take the model, train.precision and optim ({_kept_by_some()}) that it was "
                "written with (its config is in manifest.json)"
            )


def _kept_by_some() -> str:
    """The options that the state of some optimizers depends on."""
    return "; ".join(
        f"with {one.title}, {' and '.join(one.resume_keeps)} too"
        for one in OPTIMIZERS.values()
        if one.resume_keeps
    )


def _same(
    key: str, stored: Description | None, asked: Description | None, state: StateTensors | None
) -> bool:
    if stored is None or asked is None:
        return stored is asked
    return stored[1] == asked[1] and fits(key, stored[0], asked[0], state)


def _describe(tensor: Description | None) -> str:
    if tensor is None:
        return "absent"
    shape, dtype = tensor
    sizes = "x".join(str(size) for size in shape)
    return sizes if dtype is None else f"{sizes} {str(dtype).removeprefix('torch.')}"


def _raise_together(error: str | None, ranks: Ranks) -> None:
    """Raise the first error of any rank on all of them, so that none is left waiting."""
    errors = [told for told in _all_gather(error, ranks) if told is not None]
    if errors:
        raise UserError(errors[0])


def _all_gather(mine: Any, ranks: Ranks) -> list[Any]:
    if ranks.world == 1:
        return [mine]
    told: list[Any] = [None] * ranks.world
    dist.all_gather_object(told, mine, group=ranks.control)
    return told
