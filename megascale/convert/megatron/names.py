"""Names of tensors in Megatron's checkpoints, and the place of a box of our tensors in them.

megatron-core's local layers and Transformer Engine's have the same names, except for two norms.
There are two forms. Stacked: layers are along the first axis of `decoder.layers.*`, and experts
along the next. Apart: each has its own name, `decoder.layers.3.*`, `experts.experts.5.*`, and the
halves of a gated matrix are two tensors. Megatron takes the second form for layers that differ,
and for `singleton_local_shards`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.storage import Index
from megascale.errors import UserError

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LAYERS, EXPERTS = "decoder.layers.", "experts.experts."
FC1, HALVES = "linear_fc1.weight", ("_w", "_v")
ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Our names of norms, and the other names that Megatron has for them."""
NO_WEIGHT = re.compile(r"(_extra_state|rotary_pos_emb\.inv_freq)$")
"""Ends of names of tensors that are tables, or state of Transformer Engine."""
OPTIMIZER = "optimizer."
_CHAINED = re.compile(r"^chained_\d+\.")
_STATE = re.compile(r"^optimizer\.state\.([A-Za-z0-9_]+)\.(.*)$")


@dataclass(frozen=True)
class Place:
    """A box of a tensor of a checkpoint."""

    key: str
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class Names:
    """The tensors of a checkpoint by their names without prefixes."""

    index: Index
    used: set[str] = field(default_factory=set)
    """Tensors that have a place in our model."""

    @cached_property
    def _keys(self) -> dict[tuple[str, str], str]:
        """(state of the optimizer or "", name) to the name in the checkpoint."""
        found: dict[tuple[str, str], str] = {}
        for key in self.index.tensors:
            bare = _CHAINED.sub("", key)
            match = _STATE.match(bare)
            state, name = (match[1], match[2]) if match else ("", bare)
            found[state, name.removeprefix(self._prefix)] = key
        return found

    @cached_property
    def _prefix(self) -> str:
        """The prefix of the names of all weights, such as `module.`."""
        ends = [key for key in self.index.tensors if key.endswith(EMBEDDING)]
        weights = [key for key in ends if not _STATE.match(_CHAINED.sub("", key))]
        return min(weights, key=len).removesuffix(EMBEDDING) if weights else ""

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Global shapes of the weights."""
        tensors = self.index.tensors
        return {n: tuple(tensors[key].size) for (state, n), key in self._keys.items() if not state}

    @cached_property
    def states(self) -> set[str]:
        """Names of the optimizer's state of a weight, such as `exp_avg`."""
        return {state for state, _ in self._keys if state}

    @property
    def rows(self) -> int:
        """Rows of the embedding, the padded ones too. Raises UserError where there is none."""
        if EMBEDDING not in self.shapes:
            raise UserError(f"there is no tensor {EMBEDDING}, so this is no GPT of megatron-core")
        return self.shapes[EMBEDDING][0]

    def _layered(self, name: str) -> str | None:
        """A key of a tensor that layers have; None where they have none."""
        wanted = re.compile(rf"decoder\.layers\.(\d+\.)?{re.escape(name)}")
        return next((key for key in self.shapes if wanted.fullmatch(key)), None)

    def in_layers(self, name: str) -> bool:
        """Whether layers have a tensor of this name."""
        return self._layered(name) is not None

    def last_dim(self, name: str) -> int | None:
        """The last dimension of a tensor that layers have."""
        key = self._layered(name)
        return None if key is None else self.shapes[key][-1]

    def places(self, key: str, place: Shape, stack: Shape, shape: Shape, state: str) -> list[Place]:
        """The place of a box of ours, or two places: the halves of a gated matrix.

        `stack` has the numbers of layers and experts, `place` the index of this layer and expert,
        `shape` the shape of the box, `state` the name of the optimizer's state ("": the weight).
        Raises UserError where the box is missing or of another shape.
        """
        wrong = ""
        for parts, offset in _candidates(key, place):
            keys = [self._keys[state, name] for name in parts if (state, name) in self._keys]
            if len(keys) < len(parts):
                continue
            wanted = (shape[0] // len(parts), *shape[1:])
            places = [self._place(one, offset, stack, wanted) for one in keys]
            found = [one for one in places if one is not None]
            if len(found) == len(parts):
                self.used.update(keys, self._other_names(key, place, state))
                return found
            size = tuple(self.index.tensors[keys[0]].size)
            wrong = f"{keys[0]} is {_by(size)}, and {_by(stack + shape)} by the architecture"
        what = f"the {state} of {key}" if state else key
        raise UserError(wrong or f"tensor {what}{_which(place)} is missing")

    def _other_names(self, key: str, place: Shape, state: str) -> set[str]:
        """All tensors under a name of this box; a checkpoint may have it under both of ALIASES."""
        parts = (name for names, _ in _candidates(key, place) for name in names)
        return {self._keys[state, name] for name in parts if (state, name) in self._keys}

    def _place(self, key: str, offset: Shape, stack: Shape, wanted: Shape) -> Place | None:
        """The box at `offset`; rows of the vocabulary may be followed by padded ones."""
        size = tuple(self.index.tensors[key].size)
        leading = stack[len(stack) - len(offset) :]
        padded = key.endswith((EMBEDDING, HEAD)) and size[0] >= wanted[0]
        if size != leading + wanted and not (padded and size[1:] == wanted[1:]):
            return None
        zeros = (0,) * len(wanted)
        return Place(key, offset + zeros, (1,) * len(offset) + wanted)

    def unused(self) -> Iterator[str]:
        """Weights that have no place in the model."""
        for (state, name), key in sorted(self._keys.items()):
            foreign = not state and not name.startswith(OPTIMIZER)
            if foreign and key not in self.used and not NO_WEIGHT.search(name):
                yield key

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor."""
        return self.index.tensors[key].properties.dtype


def _candidates(key: str, place: Shape) -> Iterator[tuple[tuple[str, ...], Shape]]:
    """(names of the parts, the index on their leading axes) for each way to store a box."""
    for name in filter(None, (key, _alias(key))):
        for written, offset in _spelled(name, place):
            yield (written,), offset
            if written.endswith(FC1):
                yield tuple(written + half for half in HALVES), offset


def _alias(key: str) -> str | None:
    rest = key.removeprefix(LAYERS)
    return LAYERS + ALIASES[rest] if rest in ALIASES else None


def _spelled(name: str, place: Shape) -> Iterator[tuple[str, Shape]]:
    yield name, place
    if place:
        own = name.replace(LAYERS, f"{LAYERS}{place[0]}.")
        yield own, place[1:]
        if len(place) == 2:
            yield own.replace(EXPERTS, f"{EXPERTS}{place[1]}."), ()


def _which(place: Shape) -> str:
    words = zip(("layer", "expert"), place, strict=False)
    return "".join(f", {word} {number}" for word, number in words)


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))
