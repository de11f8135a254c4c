"""Safetensors files of a model folder: read a tensor at a time, written as a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.manifest import is_plain_name
from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.storage import one_line
from megascale.convert.huggingface.documents import write_document
from megascale.errors import UserError
from megascale.parsing import read_json
from megascale.reading import require_regular
from megascale.runtime.files import whole_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ModelFiles:
    """The tensors of a model folder by name, whole or in shards; none is in memory."""

    folder: Path
    file_of: Mapping[str, str]
    """The file that holds a tensor."""
    handles: Mapping[str, Any]
    """Open files by name."""

    @staticmethod
    def open(folder: Path) -> ModelFiles:
        """Open all files. Raises UserError where one is missing, cut short or not safetensors."""
        listed = _listed(folder)
        files = sorted(set(listed.values())) if listed else [SINGLE]
        handles = {file: _open(folder / file) for file in files}
        held = {name: file for file, handle in handles.items() for name in handle.keys()}
        for name, file in listed.items():
            if name not in handles[file].keys():
                raise UserError(f"{folder / file} lacks {name}, which {INDEX} puts there")
        return ModelFiles(folder, held, handles)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor that is there."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor that is there. Raises UserError for one that holds no weights."""
        dtype = self._slice(name).get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{self.folder / self.file_of[name]}: {name} is {dtype}; {', '.join(DTYPES)} can "
                "be read, so save the model in one of them"
            )
        return DTYPES[dtype]

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is there."""
        tensor: torch.Tensor = self.handles[self.file_of[name]].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        return self.handles[self.file_of[name]].get_slice(name)


def _listed(folder: Path) -> dict[str, str]:
    """The index: tensor to file; empty for a model in one file."""
    path = folder / INDEX
    if not path.is_file():
        if not (folder / SINGLE).is_file():
            pickled = any(folder.glob("*.bin"))
            hint = "its .bin files are pickles, which are not read; " if pickled else ""
            raise UserError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; {hint}save the model as safetensors"
            )
        return {}
    try:
        listed = read_json(path)["weight_map"]
        if all(is_plain_name(file) for file in listed.values()):
            return dict(listed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is no index of tensors and files; copy the model again")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        require_regular(path)
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; copy the model again") from None


def write_files(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_bytes: int,
) -> list[Path]:
    """Write tensors, which come in the order of `shapes`, into files of about `shard_bytes`.

    Each is written as it comes: the format puts all shapes first, so nothing need be kept.
    Returns the files. Raises OSError.
    """
    shards = _cut(shapes, dtype.itemsize, shard_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        listed = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        total = sum(math.prod(shape) for shape in shapes.values())
        facts = {"total_parameters": total, "total_size": total * dtype.itemsize}
        document = {"metadata": facts, "weight_map": listed}
        write_document(document, folder / INDEX)
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        with whole_file(folder / file) as out:
            out.write(_header({name: shapes[name] for name in names}, dtype))
            for wanted in names:
                name, tensor = next(stream)
                if name != wanted or tuple(tensor.shape) != shapes[name]:
                    raise RuntimeError(f"{name} came where {wanted} was to be written")
                flat = tensor.to(dtype).contiguous().flatten()
                out.write(flat.view(torch.uint8).numpy().data)
    return [folder / file for file in files]


def _cut(shapes: Mapping[str, Shape], item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """Names of each shard, in order; a tensor that is larger than a shard has one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    """What a safetensors file begins with: its length, then names, types, shapes and places."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        document[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
