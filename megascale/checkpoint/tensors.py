"""Checkpoints as global tensors: read and written a piece at a time, with no ranks and no model.

What makes a checkpoint from others (growth, other formats) streams pieces, so that a model need
not fit in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megascale.checkpoint.boxes import MASTER, OPTIMIZER_PREFIX
from megascale.checkpoint.folder import whole_or_not_at_all
from megascale.checkpoint.load import Found
from megascale.checkpoint.manifest import Manifest, Position, current_versions
from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.read import read_piece
from megascale.checkpoint.storage import (
    Entry,
    Index,
    Written,
    check_cover,
    read_index,
    write_index,
    write_tensors,
)
from megascale.config import parse_config
from megascale.errors import UserError
from megascale.model.vocabulary import VOCABULARY


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, and what is in it."""

    key: str
    """Name of the global tensor, as megatron-core's distributed checkpoints name it. Layers
    stand along the first axis of `decoder.layers.*`, experts along the second."""
    global_shape: Shape
    offset: Shape
    """Where the box begins in the global tensor."""
    tensor: torch.Tensor

    @staticmethod
    def whole(key: str, tensor: torch.Tensor) -> Piece:
        """A tensor in one piece."""
        return Piece(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


@dataclass(frozen=True)
class Tensors:
    """The global tensors of a verified checkpoint, without the padded rows of the vocabulary that
    earlier versions saved."""

    found: Found
    moment: str = ""
    """Of the optimizer's moments, the one that is spoken of in place of the weights."""

    @cached_property
    def _index(self) -> Index:
        return read_index(self.found.folder)

    @cached_property
    def _num_ids(self) -> int | None:
        """Of the model that the manifest describes; None where it describes none."""
        try:
            return parse_config(self.found.manifest.position.config).model.vocab_size
        except UserError:
            return None

    def _without_padding(self, key: str, shape: Shape) -> Shape:
        if self._num_ids is None or not key.endswith(VOCABULARY):
            return shape
        return (min(shape[0], self._num_ids), *shape[1:])

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Global shapes of the weights by key, in order of key, without the optimizer's state; or
        those of a moment, under the same keys.

        Raises UserError where the index is refused.
        """
        stored = {
            key: self._without_padding(key, tuple(one.size))
            for key, one in sorted(self._index.tensors.items())
        }
        if self.moment:
            prefix = moment_key(self.moment, "")
            return {k[len(prefix) :]: size for k, size in stored.items() if k.startswith(prefix)}
        return {key: size for key, size in stored.items() if not key.startswith(OPTIMIZER_PREFIX)}

    @property
    def state_names(self) -> set[str]:
        """Names of the tensors that the optimizer keeps of weights, without master weights."""
        keys = [key for key in self._index.tensors if key.startswith(OPTIMIZER_PREFIX)]
        return {key[len(OPTIMIZER_PREFIX) :].partition(".")[0] for key in keys} - {MASTER}

    def read(self, key: str, offset: Shape = (), shape: Shape | None = None) -> torch.Tensor:
        """A box of a tensor, all of it by default; leading axes suffice: `read(key, (3,), (1,))`
        is layer 3 alone, with that axis.

        A run in bf16 keeps its weights in fp32 beside them, and these are read then.
        A moment is read under the key of its weight.
        Raises KeyError for an unknown key, UserError where the file is refused.
        """
        master = f"{OPTIMIZER_PREFIX}{self.moment or MASTER}.{key}"
        key = master if master in self._index.tensors else key
        whole = self._without_padding(key, tuple(self._index.tensors[key].size))
        offset += (0,) * (len(whole) - len(offset))
        shape = shape or ()
        shape += tuple(n - o for n, o in zip(whole, offset, strict=True))[len(shape) :]
        return read_piece(self.found.folder, self._index, key, offset, shape)


def moment_key(moment: str, key: str) -> str:
    """Name of the global tensor of a weight's moment."""
    return f"{OPTIMIZER_PREFIX}{moment}.{key}"


def write_checkpoint(
    out: Path, pieces: Iterable[Piece], position: Position, optimizer_steps: int = 0
) -> Manifest:
    """`fill_checkpoint` as the folder `out`, which appears when it is complete.

    Raises UserError where `out` exists or cannot be written.
    """
    with whole_or_not_at_all(out) as unfinished:
        return fill_checkpoint(unfinished, pieces, position, optimizer_steps)


def fill_checkpoint(
    folder: Path, pieces: Iterable[Piece], position: Position, optimizer_steps: int = 0
) -> Manifest:
    """Write weights, and the moments of an optimizer that has taken `optimizer_steps`, into an
    empty folder; 0: there are no moments.

    Pieces are written as they come and none is kept. Raises OSError, RuntimeError where the pieces
    do not cover every tensor once.
    """
    entries, written = write_pieces(folder, pieces)
    files = write_index(folder, [entries], [written])
    manifest = Manifest(position, optimizer_steps, {}, current_versions(), files)
    manifest.write(folder)
    return manifest


def write_pieces(folder: Path, pieces: Iterable[Piece]) -> tuple[list[Entry], Written]:
    """Write the one file of tensors of `folder`: what its index says of them.

    Raises OSError, RuntimeError where the pieces do not cover every tensor once.
    """
    entries: list[Entry] = []

    def contents() -> Iterator[torch.Tensor]:
        for one in pieces:
            tensor = one.tensor
            if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            shape = tuple(tensor.shape)
            entries.append(Entry(one.key, one.global_shape, tensor.dtype, one.offset, shape))
            yield tensor

    written = write_tensors(folder, 0, contents())
    check_cover([entries])
    return entries, written
