"""The files of one checkpoint, in megatron-core's `torch_dist` format.

Every rank writes its boxes into one file, each as a tensor in torch's own format; `.metadata`
says which box is where. `dist_checkpointing.load` of megatron-core reads the result.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megascale.checkpoint.manifest import FileSum, is_plain_name
from megascale.checkpoint.pickles import RestrictedUnpickler, Skipped
from megascale.checkpoint.ranges import Shape
from megascale.errors import UserError
from megascale.reading import open_regular
from megascale.runtime.files import write_file

if TYPE_CHECKING:
    from megascale.checkpoint.boxes import Box

METADATA = ".metadata"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Entry:
    """One box as all ranks know it: no memory, only where it belongs."""

    key: str
    global_shape: Shape
    dtype: torch.dtype
    offset: Shape
    shape: Shape

    @staticmethod
    def of(box: Box) -> Entry:
        """What other ranks must know of a box."""
        return Entry(box.key, box.global_shape, box.holder().dtype, box.offset, box.shape)


@dataclass(frozen=True)
class Written:
    """What one rank wrote into its file."""

    file: str
    sum: FileSum
    places: tuple[tuple[int, int], ...]
    """(first byte, bytes) of each of its boxes."""


class _SummingStream(io.RawIOBase):
    """A file that is summed while it is written, so that it need not be read again."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.size = stream, xxhash.xxh3_128(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, block: Any) -> int:
        """Write all of `block`. Raises OSError, e.g. when the disk is full."""
        view = memoryview(block).cast("B")
        self.digest.update(view)
        try:
            done = 0
            while done < len(view):  # one unbuffered write stops at 2 GiB
                done += self.stream.write(view[done:])
        except OSError as error:
            self.error = error
            raise
        self.size += done
        return done


def data_file(rank: int) -> str:
    """Name of the file that `rank` writes."""
    return f"__{rank}_0.distcp"


def write_tensors(folder: Path, rank: int, tensors: Iterable[torch.Tensor]) -> Written:
    """Write this rank's file and wait until it is on the disk.

    Each tensor must be alone in its storage. Raises OSError, with the file removed to free its
    space, when the write fails, and where what `folder` should be in is not there: a file system
    that comes back would hide what was written to its place.
    """
    folder.mkdir(exist_ok=True)
    path = folder / data_file(rank)
    try:
        with path.open("wb", buffering=0) as raw:
            stream = _SummingStream(raw)
            places = tuple(_append(stream, tensor) for tensor in tensors)
            os.fsync(raw.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Written(path.name, FileSum(stream.size, stream.digest.hexdigest()), places)


def _append(stream: _SummingStream, tensor: torch.Tensor) -> tuple[int, int]:
    """Write one tensor; its (first byte, bytes). torch hides a failed write; raise it as it was."""
    began = stream.size
    try:
        torch.save(tensor, cast(IO[bytes], stream))
    except RuntimeError:
        raise (stream.error or OSError("torch could not write a tensor")) from None
    return began, stream.size - began


def write_index(
    folder: Path, entries: Sequence[Sequence[Entry]], written: Sequence[Written]
) -> dict[str, FileSum]:
    """Write what describes the data files of all ranks; returns the sums of all files."""
    empty = io.BytesIO()
    torch.save({}, empty)
    contents = {
        METADATA: pickle.dumps(metadata_of(entries, written)),
        "metadata.json": json.dumps(BACKEND).encode(),
        "common.pt": empty.getvalue(),  # megatron-core wants the file; nothing is kept in it
    }
    sums = {report.file: report.sum for report in written}
    for name, content in contents.items():
        write_file(folder / name, content, synced=True)
        sums[name] = FileSum(len(content), xxhash.xxh3_128_hexdigest(content))
    return sums


def check_cover(entries: Sequence[Sequence[Entry]]) -> None:
    """Raise RuntimeError unless the ranks' boxes hold every element of every tensor once."""
    wanted: dict[str, tuple[Shape, torch.dtype]] = {}
    covered: dict[str, int] = {}
    seen: set[tuple[str, Shape]] = set()
    for entry in (entry for of_rank in entries for entry in of_rank):
        if wanted.setdefault(entry.key, (entry.global_shape, entry.dtype)) != (
            entry.global_shape,
            entry.dtype,
        ):
            raise RuntimeError(f"{entry.key} has different shapes on different ranks")
        if (entry.key, entry.offset) in seen:
            raise RuntimeError(f"{entry.key} at {entry.offset} would be written twice")
        seen.add((entry.key, entry.offset))
        covered[entry.key] = covered.get(entry.key, 0) + torch.Size(entry.shape).numel()
    for key, (shape, _) in wanted.items():
        if covered[key] != torch.Size(shape).numel():
            raise RuntimeError(f"{key}: {covered[key]} elements would be written of {shape}")


@dataclass(frozen=True)
class Index:
    """What `.metadata` says."""

    metadata: Metadata
    tensors: dict[str, TensorStorageMetadata]


def read_index(folder: Path, unpickler: type[pickle.Unpickler] = RestrictedUnpickler) -> Index:
    """Read `.metadata` with an unpickler that knows only the classes it needs.

    Entries that it reads as `Skipped` are no tensors and are left out.
    Raises UserError when the file holds anything else: nothing in it is ever executed.
    """
    path = folder / METADATA
    try:
        with open_regular(path) as file:
            return _checked(unpickler(file).load())
    except Exception as error:  # a forged pickle can raise anything
        raise UserError(f"{path} is refused: {one_line(error)}") from None


def _checked(metadata: Any) -> Index:
    if not isinstance(metadata, Metadata):
        raise ValueError("it holds no checkpoint metadata")
    tensors: dict[str, TensorStorageMetadata] = {}
    for key, tensor in metadata.state_dict_metadata.items():
        if isinstance(tensor, Skipped):
            continue
        if not isinstance(key, str) or not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{key!r} is not a tensor")
        tensors[key] = tensor
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise ValueError("it does not say where its tensors are")
        if not is_plain_name(place.relative_path):
            raise ValueError(f"{place.relative_path!r} is not in its folder")
    return Index(metadata, tensors)


def metadata_of(entries: Sequence[Sequence[Entry]], written: Sequence[Written]) -> Metadata:
    """The content of `.metadata`: which box of which tensor is where, by rank."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for of_rank, report in zip(entries, written, strict=True):
        for entry, (began, size) in zip(of_rank, report.places, strict=True):
            tensor = tensors.setdefault(
                entry.key,
                TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype), torch.Size(entry.global_shape), []
                ),
            )
            index = MetadataIndex(entry.key, entry.offset, len(tensor.chunks))
            places[index] = _StorageInfo(report.file, began, size)
            tensor.chunks.append(
                ChunkStorageMetadata(torch.Size(entry.offset), torch.Size(entry.shape))
            )
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def one_line(error: BaseException) -> str:
    """The message of an error that came from a library, cut to one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
