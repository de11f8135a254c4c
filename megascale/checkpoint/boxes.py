"""Which part of which global tensor this rank holds, and which part of it this rank writes.

megatron-core says where each weight lies in its global tensor (cut by TP, PP and EP). The
distributed optimizer further cuts every flattened weight into ranges over the data-parallel
ranks. A range of a flattened tensor is a few boxes of it, so each rank's state becomes boxes of
the global tensors, and any layout can be loaded into any other, with no gathering over ranks.
(megatron-core's own resharding format gathers the state on one rank of each group to save it.)

The factors of an optimizer (`optim.optimizer_kind.Factors`) belong to a matrix as its tensor rank
holds it, so their global tensors have the matrix's place in the weight, in matrices, as two axes
before their own; resuming with another number of tensor ranks is refused, because then they have
other shapes.

Padded rows of the vocabulary are left out, so a checkpoint does not depend on the padding. Only
what an optimizer keeps in a basis over the rows has them: it is not a row for each id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megascale.checkpoint.ranges import Shape, boxes_of_range
from megascale.model.model import Model
from megascale.model.vocabulary import ids_among
from megascale.optim.build import Optimizer
from megascale.optim.optimizer_kind import StateTensors

OPTIMIZER_PREFIX = "optimizer.state."
MASTER = "fp32_param"


@dataclass(frozen=True)
class Box:
    """A box of a global tensor, and the live memory on this rank that holds it."""

    key: str
    """Name of the global tensor, as megatron-core's distributed checkpoints name it."""
    global_shape: Shape
    offset: Shape
    """Where the box begins in the global tensor."""
    shape: Shape
    holder: Callable[[], torch.Tensor]
    """Gives the tensor that holds the box now. Not the tensor itself, because an optimizer may
    replace its state tensors."""
    start: int
    """Position of the box's first element in that tensor, flattened."""

    def live(self) -> torch.Tensor:
        """A view of the live memory, in the shape of the box."""
        flat = self.holder().detach().view(-1)
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class _Part:
    """A contiguous piece of a parameter: all of it, or one half of a fused SwiGLU matrix."""

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    start: int
    """Position of the piece in the flattened parameter."""
    replica: Shape
    """(pipeline, tensor, data-parallel) replica; zeros where this is the original."""


@dataclass(frozen=True)
class _Held:
    """Elements [start, stop) of a flattened parameter, or of state in the same shape."""

    prefix: str
    holder: Callable[[], torch.Tensor]
    start: int
    stop: int
    replicas: int
    """Data-parallel ranks that hold the same elements."""
    in_row_basis: bool = False
    """State in a basis over the rows of the weight, the padded ones included."""


def boxes(model: Model, optimizer: Optimizer | None, to_write: bool = False) -> list[Box]:
    """Boxes of the weights and, with `optimizer`, of its state, that this rank holds.

    With `to_write` only those that this rank writes: over all ranks they cover each global tensor
    exactly once, with replicas shared out evenly over the data-parallel ranks.
    Raises RuntimeError when a weight is not contiguous, which megatron-core never makes.
    """
    parts_of: dict[int, list[_Part]] = {}
    found: list[Box] = []
    for entry in _leaves([_network(chunk).sharded_state_dict() for chunk in model.chunks]):
        weight, parts = entry.data, _parts(entry)
        parts_of[id(weight)] = parts
        held = _Held("", partial(_itself, weight), 0, weight.numel(), _replicas(weight))
        found += _boxes([_without_padding(part, weight) for part in parts], held, to_write)
    if optimizer is None:
        return found
    for inner in optimizer.inner:
        for weight, held in _held_state(inner, model, optimizer.state):
            parts = parts_of[id(weight)]
            if not held.in_row_basis:
                parts = [_without_padding(part, weight) for part in parts]
            found += _boxes(parts, held, to_write)
        for weight, dim, held in _held_factors(inner, model, optimizer.state):
            parts = [_factor_part(part, dim) for part in parts_of[id(weight)]]
            found += _boxes(parts, held, to_write)
    return found


def _network(chunk: torch.nn.Module) -> Any:
    """megatron-core's network inside its wrappers."""
    network: Any = chunk
    while hasattr(network, "module"):
        network = network.module
    return network


def _itself(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _state(adam: torch.optim.Optimizer, main: torch.Tensor, name: str) -> torch.Tensor:
    moment: torch.Tensor = adam.state[main][name]
    return moment


def _leaves(tree: object) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """Tensors of a sharded state dict. Its other objects are Transformer Engine's FP8 scales,
    empty without FP8: they are pickled, and a checkpoint holds nothing that needs that."""
    if isinstance(tree, (ShardedTensor, ShardedTensorFactory)):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(value)


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> list[_Part]:
    pieces = list(_leaves(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    return [_part(piece, entry.data) for piece in pieces]


def _part(piece: ShardedTensor, whole: torch.Tensor) -> _Part:
    if not piece.data.is_contiguous():
        raise RuntimeError(f"{piece.key} is not contiguous and cannot be written in place")
    return _Part(
        key=piece.key,
        global_shape=tuple(piece.global_shape),
        offset=tuple(piece.global_offset),
        shape=(1,) * piece.prepend_axis_num + tuple(piece.local_shape),
        start=piece.data.storage_offset() - whole.storage_offset(),
        replica=tuple(piece.replica_id),
    )


def _without_padding(part: _Part, weight: torch.Tensor) -> _Part:
    """The rows of a weight of the vocabulary that belong to ids; any other weight as it is."""
    num_ids = getattr(weight, "num_ids", None)
    if num_ids is None:
        return part
    rows = ids_among(part.shape[0], part.offset[0], num_ids)
    return replace(
        part,
        global_shape=(num_ids, *part.global_shape[1:]),
        shape=(rows, *part.shape[1:]),
    )


def _held_state(
    inner: Any, model: Model, state: StateTensors
) -> Iterator[tuple[torch.Tensor, _Held]]:
    """(parameter, state) for the master weight, where it is a copy, and each moment."""
    row_basis = state.factors.row_basis if state.factors is not None else None
    for weight, main, start, stop in _main_parameters(inner, model):
        replicas = _state_replicas(inner, weight)
        holders = {name: partial(_state, inner.optimizer, main, name) for name in state.moments}
        if main.dtype != weight.dtype:
            holders[MASTER] = partial(_itself, main)
        turned = row_basis in inner.optimizer.state.get(main, {})
        for name, holder in holders.items():
            prefix, in_basis = f"{OPTIMIZER_PREFIX}{name}.", turned and name != MASTER
            yield weight, _Held(prefix, holder, start, stop, replicas, in_basis)


def _held_factors(
    inner: Any, model: Model, state: StateTensors
) -> Iterator[tuple[torch.Tensor, int, _Held]]:
    """(parameter, the dimension that they belong to, state) for each factor that a weight has."""
    if state.factors is None:
        return
    for weight, main, _, _ in _main_parameters(inner, model):
        for name, dim in state.factors.dimensions.items():
            factor = inner.optimizer.state[main].get(name)
            if factor is not None:
                holder = partial(_state, inner.optimizer, main, name)
                replicas = _state_replicas(inner, weight)
                prefix = f"{OPTIMIZER_PREFIX}{name}."
                yield weight, dim, _Held(prefix, holder, 0, factor.numel(), replicas)


def _factor_part(part: _Part, dim: int) -> _Part:
    """The [size, size] tensor that belongs to dimension `dim` of a matrix."""
    size = part.shape[dim]
    places = tuple(at // of for at, of in zip(part.offset[-2:], part.shape[-2:], strict=True))
    counts = tuple(g // of for g, of in zip(part.global_shape[-2:], part.shape[-2:], strict=True))
    return replace(
        part,
        global_shape=(*part.global_shape[:-2], *counts, size, size),
        offset=(*part.offset[:-2], *places, 0, 0),
        shape=(*part.shape[:-2], 1, 1, size, size),
        start=part.start // math.prod(part.shape) * size * size,
    )


def _main_parameters(
    inner: Any, model: Model
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """(parameter, what the optimizer updates in its place, range of it that is held here)."""
    groups = inner.optimizer.param_groups
    if isinstance(inner, DistributedOptimizer):
        for weight, (group, order) in inner.model_param_group_index_map.items():
            held = inner._get_model_param_range_map(weight)["param"]
            yield weight, groups[group]["params"][order], held.start, held.end
        return
    updated = {id(parameter) for group in groups for parameter in group["params"]}
    for weight in model.parameters():
        main = getattr(weight, "main_param", weight)
        if id(main) in updated:
            yield weight, main, 0, weight.numel()


def _boxes(parts: list[_Part], held: _Held, to_write: bool) -> list[Box]:
    found: list[Box] = []
    for part in parts:
        if to_write and part.replica[:2] != (0, 0):
            continue
        start = max(0, held.start - part.start)
        stop = min(math.prod(part.shape), held.stop - part.start)
        if to_write and held.replicas > 1:
            first, last = _share(part, held.replicas)
            start, stop = max(start, first), min(stop, last)
        position = part.start + start - held.start
        for offset, shape in boxes_of_range(part.shape, start, stop):
            origin = tuple(a + b for a, b in zip(part.offset, offset, strict=True))
            key = held.prefix + part.key
            found.append(Box(key, part.global_shape, origin, shape, held.holder, position))
            position += math.prod(shape)
    return found


def _share(part: _Part, replicas: int) -> tuple[int, int]:
    """Range of the flattened part, in whole rows, that this data-parallel rank writes."""
    row = part.shape[-1]
    rows = math.prod(part.shape) // max(1, row)
    first, last = (rows * share // replicas for share in (part.replica[2], part.replica[2] + 1))
    return first * row, last * row


def _state_replicas(inner: Any, weight: torch.Tensor) -> int:
    """Data-parallel ranks that hold the same optimizer state of this weight."""
    alone = isinstance(inner, DistributedOptimizer) or getattr(inner, "is_dealt", False)
    return 1 if alone else _replicas(weight)


def _replicas(weight: torch.Tensor) -> int:
    """Data-parallel ranks that hold this weight; experts have their own such axis."""
    if getattr(weight, "allreduce", True):
        return int(parallel_state.get_data_parallel_world_size())
    return int(parallel_state.get_expert_data_parallel_world_size())
