"""A checkpoint of ours as one that megatron-core loads with nothing missing, optimizer included.

Tensors are streamed, one box of one layer at a time, into one file. Entries of the index that
have the same content lead to the same bytes.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megascale.checkpoint.boxes import MASTER
from megascale.checkpoint.load import Found
from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.read import read_piece
from megascale.checkpoint.storage import (
    BACKEND,
    METADATA,
    Index,
    metadata_of,
    read_index,
)
from megascale.checkpoint.tensors import Piece, moment_key, write_pieces
from megascale.config import ModelConfig
from megascale.convert.megatron.names import ALIASES, EXPERTS, LAYERS
from megascale.convert.megatron.optimizer import MOMENTS
from megascale.convert.megatron.source import BACKEND as BACKEND_FILE
from megascale.convert.megatron.source import COMMON, LATEST
from megascale.convert.megatron.tensors import Tensor, tensors_of
from megascale.errors import UserError
from megascale.model.counts import padded_vocab_size
from megascale.model.vocabulary import VOCABULARY
from megascale.runtime.files import write_file

WEIGHT = "optimizer.state.param."
OBJECTS_FILE = "__1_0.distcp"
DENSE_PARTS = ("mlp.linear_fc1", "mlp.linear_fc2")
ATTENTION_PARTS = tuple(
    f"self_attention.{part}"
    for part in ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
)
SHARED_PARTS = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
EXPERT_PARTS = tuple(f"mlp.{EXPERTS}{part}" for part in ("linear_fc1", "linear_fc2"))
NORM_PARTS = ("input_layernorm", "pre_mlp_layernorm")
FINAL = "decoder.final_layernorm"


@dataclass(frozen=True)
class MegatronWriter:
    """Writes one checkpoint in Megatron's form."""

    found: Found
    model: ModelConfig
    keeps_optimizer: bool

    def write(self, out: Path, common: dict[str, Any], iteration: int) -> Path:
        """Fill the empty folder `out` as Megatron-LM does; the folder of the iteration.

        Raises UserError where the checkpoint is not of the model, OSError.
        """
        folder = out / f"iter_{iteration:07d}"
        entries, written = write_pieces(folder, self._pieces(read_index(self.found.folder)))
        metadata = metadata_of([entries], [written])
        self._add_aliases(metadata)
        write_file(folder / OBJECTS_FILE, self._add_objects(metadata), synced=True)
        write_file(folder / METADATA, pickle.dumps(metadata), synced=True)
        write_file(folder / COMMON, _saved(common), synced=True)
        write_file(folder / BACKEND_FILE, json.dumps(BACKEND), synced=True)
        write_file(out / LATEST, f"{iteration}\n", synced=True)
        return folder

    def _pieces(self, index: Index) -> Iterator[Piece]:
        states = (MASTER, *MOMENTS) if self.keeps_optimizer else ()
        for tensor, state in product(tensors_of(self.model), ("", *states)):
            key = moment_key(state, tensor.key) if state else tensor.key
            if state == MASTER and key not in index.tensors:
                continue  # weights in fp32: `_add_aliases`
            self._require(index, key, tensor)
            for place in tensor.places():
                yield from self._boxes(index, key, tensor, place)

    def _boxes(self, index: Index, key: str, tensor: Tensor, place: Shape) -> Iterator[Piece]:
        """A box, and the padded rows of the vocabulary, which are 0."""
        name = _state_name(key)
        offset, shape = place + (0,) * len(tensor.shape), (1,) * len(place) + tensor.shape
        size = tensor.size
        if tensor.key in VOCABULARY:
            size = (padded_vocab_size(self.model), *size[1:])
        box = read_piece(self.found.folder, index, key, offset, shape)
        yield Piece(name, size, offset, box)
        if size != tensor.size:
            rows = size[0] - tensor.size[0]
            yield Piece(name, size, (tensor.size[0], 0), box.new_zeros(rows, *size[1:]))

    def _require(self, index: Index, key: str, tensor: Tensor) -> None:
        stored = tuple(index.tensors[key].size) if key in index.tensors else ()
        padded = tensor.key in VOCABULARY and stored[1:] == tensor.size[1:]
        if stored != tensor.size and not (padded and stored[0] > tensor.size[0]):
            raise UserError(
                f"checkpoint {self.found.folder}: {key} is {_by(stored) or 'absent'}, and "
                f"{_by(tensor.size)} in the model that its manifest speaks of"
            )

    def _add_aliases(self, metadata: Metadata) -> None:
        """Further names: weights in fp32 as the optimizer's, and norms that Megatron's layers do
        not join with the product behind them."""
        keys = [tensor.key for tensor in tensors_of(self.model)]
        if self.keeps_optimizer:
            for key in keys:
                if WEIGHT + key not in metadata.state_dict_metadata:
                    _alias(metadata, key, WEIGHT + key)
        states = [moment_key(state, "") for state in MOMENTS] + [WEIGHT]
        for ours, theirs in ALIASES.items():
            for prefix in ("", *(states if self.keeps_optimizer else ())):
                _alias(metadata, prefix + LAYERS + ours, prefix + LAYERS + theirs)

    def _add_objects(self, metadata: Metadata) -> bytes:
        """Entries of the state that layers keep for fp8, which is empty; the file of their content.

        Local layers of megatron-core ask for some of them, and Transformer Engine's for others.
        """
        content = _saved([None])
        layers = self.model.num_layers
        moe = self.model.moe
        parts = ATTENTION_PARTS + NORM_PARTS + (DENSE_PARTS if moe is None else SHARED_PARTS)
        names: list[tuple[str, Shape]] = [(FINAL, (1,))]
        names += [(LAYERS + part, (layers,)) for part in parts]
        if moe is not None:
            names += [(LAYERS + part, (layers, moe.num_experts)) for part in EXPERT_PARTS]
        for name, stack in names:
            for place in product(*map(range, stack)):
                key = f"{name}._extra_state/shard_{_dotted(place)}_{_dotted(stack)}"
                metadata.state_dict_metadata[key] = BytesStorageMetadata()
                metadata.storage_data[MetadataIndex(key)] = _StorageInfo(
                    OBJECTS_FILE, 0, len(content)
                )
        return content


def _state_name(key: str) -> str:
    """Megatron's name of a tensor of ours."""
    master = moment_key(MASTER, "")
    return WEIGHT + key.removeprefix(master) if key.startswith(master) else key


def _alias(metadata: Metadata, key: str, name: str) -> None:
    """Let `name` lead to the bytes of `key`."""
    tensor = metadata.state_dict_metadata[key]
    assert isinstance(tensor, TensorStorageMetadata)
    metadata.state_dict_metadata[name] = tensor
    for place, chunk in enumerate(tensor.chunks):
        stored = metadata.storage_data[MetadataIndex(key, chunk.offsets, place)]
        metadata.storage_data[MetadataIndex(name, chunk.offsets, place)] = stored


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _dotted(numbers: Shape) -> str:
    return ".".join(map(str, numbers))


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))
