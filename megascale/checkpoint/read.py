"""Reading boxes of global tensors out of a checkpoint, into live memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.shards import OPTIMIZER_PREFIX, Box
from megascale.checkpoint.storage import Index, one_line, read_index
from megascale.errors import UserError
from megascale.runtime.distributed import Ranks

Description = tuple[tuple[int, ...], torch.dtype]


def load_boxes(folder: Path, wanted: list[Box], with_optimizer: bool, ranks: Ranks) -> None:
    """Fill the live memory of `wanted` from a checkpoint of any layout.

    Raises UserError on every rank when a tensor is missing, left over, of another shape or dtype,
    or when a file on any rank is refused.
    """
    error: str | None = None
    try:
        index = read_index(folder)
        plan = _plan(index, wanted)
    except UserError as refused:
        error = str(refused)
    _raise_together(error, ranks)
    _check_same_tensors(folder, index, wanted, with_optimizer, ranks)
    try:
        _read(folder, index, plan, wanted)
    except UserError as refused:
        error = str(refused)
    _raise_together(error, ranks)


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
        if stored is None or tuple(stored.size) != boxes[0].global_shape:
            continue  # named, once for all ranks, by _check_same_tensors
        chunks = [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in boxes]
        found = create_read_items_for_chunk_list(key, stored, chunks)
        if sum(math.prod(item.lengths) for item in found) != sum(c.sizes.numel() for c in chunks):
            raise UserError(f"checkpoint tensor {key} has holes; take another checkpoint")
        items += found
    return LoadPlan(items)


def _check_same_tensors(
    folder: Path, index: Index, wanted: list[Box], with_optimizer: bool, ranks: Ranks
) -> None:
    """Raise UserError, naming the first tensor that the run and the checkpoint differ in."""
    asked: dict[str, Description] = {}
    for of_rank in _all_gather({b.key: (b.global_shape, b.holder().dtype) for b in wanted}, ranks):
        asked |= of_rank
    stored: dict[str, Description] = {
        key: (tuple(tensor.size), tensor.properties.dtype)
        for key, tensor in index.tensors.items()
        if with_optimizer or not key.startswith(OPTIMIZER_PREFIX)
    }
    keys = asked.keys() | stored.keys()
    for key in sorted(keys, key=lambda key: (key.startswith(OPTIMIZER_PREFIX), key)):
        if asked.get(key) != stored.get(key):
            raise UserError(
                f"checkpoint {folder} does not fit this run: tensor {key} is "
                f"{_describe(stored.get(key))} there and {_describe(asked.get(key))} here; "
                "resume with the model, train.precision and optim (with SOAP, parallel.tensor too) "
                "that it was written with (its config is in manifest.json)"
            )


def _describe(tensor: Description | None) -> str:
    if tensor is None:
        return "absent"
    shape, dtype = tensor
    return f"{'x'.join(str(size) for size in shape)} {str(dtype).removeprefix('torch.')}"


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
