"""Outputs of cheap operations that the backward pass computes again, in the place of keeping them.

An operation says how to compute its output again. What would save that output for the backward
pass then keeps the way to it: the operation's own inputs, which its backward pass keeps anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


@contextmanager
def recomputing(parts: frozenset[str]) -> Iterator[None]:
    """Outputs that `computed_by` gives to one of `parts` inside are not kept.

    Other saved tensors go to the hooks that are active outside, as those of offload are.
    """
    scope = _Scope(parts, _hooks_outside())
    _active.append(scope)
    try:
        with saved_tensors_hooks(scope.pack, scope.unpack):
            yield
    finally:
        _active.pop()
        scope.close()


def computed_by(
    part: str, output: torch.Tensor, function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> torch.Tensor:
    """`output`, which `function(*inputs)` computes again bit by bit if `part` is recomputed."""
    if _active and part in _active[-1].parts and torch.is_grad_enabled():
        _active[-1].note(output, function, inputs)
    return output


class _Recipe:
    """How to compute an output again, once for all who saved it."""

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]):
        self._function, self._inputs = function, inputs
        self._kept: list[Any] | None = None
        self._users = 0
        self._value: torch.Tensor | None = None

    def add_user(self, pack: Callable[[torch.Tensor], Any]) -> None:
        """Somebody saves the output. The inputs are kept from the first time on."""
        if self._kept is None:
            self._kept, self._inputs = [pack(x) for x in self._inputs], ()
        self._users += 1

    def forget(self) -> None:
        """Nobody else will save it."""
        self._inputs = ()

    def take(self, unpack: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """The output. It is let go of when the last who saved it has it."""
        value = self._value
        if value is None:
            assert self._kept is not None, "somebody saved it"
            with torch.no_grad():
                value = self._function(*map(unpack, self._kept))
        self._users -= 1
        self._value = value if self._users > 0 else None
        return value


@dataclass(frozen=True)
class _View:
    """A saved tensor that lies in a recomputed output."""

    recipe: _Recipe
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class _Scope:
    """A part of the model in which outputs are not kept."""

    def __init__(self, parts: frozenset[str], outside: Hooks) -> None:
        self.parts = parts
        self._keep, self._bring = outside
        self._known: dict[int, tuple[StorageWeakRef, _Recipe]] = {}
        """By address of the storage, which the weak reference keeps from being given away."""

    def note(
        self, output: torch.Tensor, function: Callable[..., torch.Tensor], inputs: tuple[Any, ...]
    ) -> None:
        """`output` can be computed again."""
        storage = output.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage), _Recipe(function, inputs)

    def pack(self, tensor: torch.Tensor) -> Any:
        """What is kept of a saved tensor."""
        _, recipe = self._known.get(tensor.untyped_storage()._cdata, (None, None))
        if recipe is None:
            return self._keep(tensor)
        recipe.add_user(self._keep)
        return _View(recipe, tensor.storage_offset(), tensor.size(), tensor.stride())

    def unpack(self, kept: Any) -> torch.Tensor:
        """The saved tensor."""
        if not isinstance(kept, _View):
            return self._bring(kept)
        return kept.recipe.take(self._bring).as_strided(kept.size, kept.stride, kept.offset)

    def close(self) -> None:
        """The forward pass of the part is over."""
        for _, recipe in self._known.values():
            recipe.forget()
        self._known.clear()


_active: list[_Scope] = []
"""The innermost is the last."""


def _hooks_outside() -> Hooks:
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks or (_detached, _same)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """A saved output would hold its own graph node; a leaf is a weight."""
    return tensor if tensor.is_leaf else tensor.detach()


def _same(kept: torch.Tensor) -> torch.Tensor:
    return kept
