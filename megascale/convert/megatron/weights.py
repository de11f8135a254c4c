"""The pieces of our checkpoint, from the tensors of a Megatron checkpoint, one box at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megascale.checkpoint.boxes import MASTER
from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.read import read_piece
from megascale.checkpoint.storage import Index
from megascale.checkpoint.tensors import Piece, moment_key
from megascale.config import ModelConfig
from megascale.convert.megatron.names import Names, Place
from megascale.convert.megatron.optimizer import MOMENTS, master_of
from megascale.convert.megatron.tensors import Tensor, tensors_of
from megascale.convert.router_loads import even_loads
from megascale.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Places = tuple[Place, ...]


@dataclass(frozen=True)
class Box:
    """A box of a tensor of ours, and the places of its weight and state in the checkpoint."""

    tensor: Tensor
    place: Shape
    weight: Places
    states: dict[str, Places]
    """By name: `master`, and the moments."""


def boxes_of(model: ModelConfig, names: Names, moments: bool) -> list[Box]:
    """All boxes of a complete model, in the order of its tensors.

    Raises UserError where one is missing, left over, or of another shape or type.
    """
    master = master_of(names)
    wanted = {"master": master} if master else {}
    wanted |= {name: name for name in MOMENTS if moments}
    found = []
    for tensor in tensors_of(model):
        for place in tensor.places():
            at = (tensor.key, place, tensor.stack, tensor.shape)
            states = {name: tuple(names.places(*at, state)) for name, state in wanted.items()}
            found.append(Box(tensor, place, tuple(names.places(*at, "")), states))
    _require_no_others(names)
    _require_types(names, found)
    return found


def _require_no_others(names: Names) -> None:
    for key in names.unused():
        reason = ""
        if key.endswith(("norm.bias", "norm_bias")):
            reason = " (a bias of LayerNorm; only RMSNorm is built)"
        elif key.endswith(".bias"):
            reason = " (biases other than those of queries, keys and values are not built)"
        elif "position_embeddings" in key:
            reason = " (learned positions are not built; only rotary ones are)"
        raise UserError(f"tensor {key} has no place in a model of this architecture{reason}")


def _require_types(names: Names, boxes: list[Box]) -> None:
    places = (one for box in boxes for part in (box.weight, *box.states.values()) for one in part)
    for key in dict.fromkeys(place.key for place in places):
        if names.dtype(key) not in DTYPES:
            kind = str(names.dtype(key)).removeprefix("torch.")
            raise UserError(
                f"tensor {key} is of type {kind}; float32, bfloat16 and float16 are read"
            )


def dtype_of(names: Names, boxes: list[Box]) -> torch.dtype:
    """bf16 where every weight is in bf16, else fp32, which holds fp16 and bf16 exactly."""
    kinds = {names.dtype(place.key) for box in boxes for place in box.weight}
    return torch.bfloat16 if kinds == {torch.bfloat16} else torch.float32


@dataclass(frozen=True)
class Reader:
    """Reads boxes of a Megatron checkpoint as pieces of ours."""

    folder: Path
    index: Index
    dtype: torch.dtype
    """Of the weights it yields."""

    def pieces(self, model: ModelConfig, boxes: list[Box]) -> Iterator[Piece]:
        """All pieces of a checkpoint, with the state that `boxes` have; none stays in memory.

        For bf16 weights, the checkpoint's fp32 weights become state. For fp32 weights, they are
        the weights.
        """
        for box in boxes:
            yield from self._pieces(box)
        yield from even_loads(model)

    def _pieces(self, box: Box) -> Iterator[Piece]:
        master = box.states.get("master")
        kept = box.weight if master is None or self.dtype != torch.float32 else master
        yield self._piece(box, "", kept, self.dtype)
        states = {MASTER: master or box.weight} if self._keeps_master(box) else {}
        states |= {name: box.states[name] for name in MOMENTS if name in box.states}
        for name, parts in states.items():
            yield self._piece(box, name, parts, torch.float32)

    def _keeps_master(self, box: Box) -> bool:
        """Whether weights are rounded, so that the state has them in fp32 too."""
        return self.dtype == torch.bfloat16 and len(box.states) > 0

    def _piece(self, box: Box, state: str, parts: Places, dtype: torch.dtype) -> Piece:
        found = [read_piece(self.folder, self.index, p.key, p.offset, p.shape) for p in parts]
        content = found[0] if len(found) == 1 else torch.cat(found, dim=-2)
        key = moment_key(state, box.tensor.key) if state else box.tensor.key
        offset = box.place + (0,) * len(box.tensor.shape)
        shape = (1,) * len(box.place) + box.tensor.shape
        return Piece(key, box.tensor.size, offset, content.to(dtype).reshape(shape))
