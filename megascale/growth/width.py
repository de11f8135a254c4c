"""Wider models that compute the same function (Net2Net, arXiv 1511.05641, for transformers).

Every hidden unit, head and feed-forward unit is there `factor` times. What reads a copied unit
shares the old weight out among the copies and adds noise that cancels over them. (Parts that
differ by a factor alone would not do: Adam is blind to it, and copies would stay equal for ever.)
RMSNorm needs no correction, because the mean square of copies is that of the originals.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megascale.checkpoint.tensors import Piece, Tensors
from megascale.growth.tensor_names import FC1, is_layered
from megascale.model.initialise import CLOSED_TOKENS, OUTPUT_PROJECTIONS, named_generator

SPREAD = 0.5
"""Standard deviation of that noise, as part of the deviation of the shared weights."""
KEPT = (
    "q_layernorm.weight",
    "k_layernorm.weight",
    "router.load_E",
    "router.earlier_E",
    "router.bias_E",
    CLOSED_TOKENS,
)
"""Per head dimension, per expert or per layer, of which a wider model has as many."""
WITHOUT_COPIES = ("router.weight", "output_layer.weight", "shared_experts.gate_weight")
"""What reads copies and writes to units that stay as they were."""


def widen(base: Tensors, factor: int, tied: bool, seed: int = 0) -> Iterator[Piece]:
    """The base's tensors with `factor` times the hidden size, heads and feed-forward size.

    `tied` says whether the embedding is the output head as well: it then reads copies without
    sharing, which the final norm makes up for.
    """
    for key, shape in base.shapes.items():
        layers = range(shape[0]) if is_layered(key) else [None]
        for layer in layers:
            old = base.read(key) if layer is None else base.read(key, (layer,), (1,))
            new = _widened(key, old, factor, tied, f"{key}/{layer}", seed)
            whole = tuple(new.shape) if layer is None else (shape[0], *new.shape[1:])
            yield Piece(key, whole, (layer or 0, *(0 for _ in new.shape[1:])), new)


def widen_moment(moment: Tensors, factor: int, tied: bool, power: int) -> Iterator[Piece]:
    """The mean of gradients to a `power`, a moment, for the tensors that `widen` gives.

    The copies of a unit share the old gradient, so what writes to copies has 1 / factor of the old
    one; what writes to units that stay as they were (router, output head) has all of it.
    """
    for key, shape in moment.shapes.items():
        layers = range(shape[0]) if is_layered(key) else [None]
        for layer in layers:
            old = moment.read(key) if layer is None else moment.read(key, (layer,), (1,))
            new = _widened_moment(key, old, factor, tied, power)
            whole = tuple(new.shape) if layer is None else (shape[0], *new.shape[1:])
            yield Piece(key, whole, (layer or 0, *(0 for _ in new.shape[1:])), new)


def _widened_moment(
    key: str, old: torch.Tensor, factor: int, tied: bool, power: int
) -> torch.Tensor:
    if key.endswith(KEPT):
        return old
    wide = _copies(old, -1, factor)
    head = key == "decoder.final_layernorm.weight" and tied
    if head or key.endswith(WITHOUT_COPIES):
        return wide
    if key.endswith(FC1):
        wide = torch.cat([_copies(half, -2, factor) for half in wide.chunk(2, dim=-2)], dim=-2)
    elif key.endswith(("linear_qkv.weight", *OUTPUT_PROJECTIONS)):
        wide = _copies(wide, -2, factor)
    scaled: torch.Tensor = wide / factor**power
    return scaled


def _widened(
    key: str, old: torch.Tensor, factor: int, tied: bool, name: str, seed: int
) -> torch.Tensor:
    if key.endswith(KEPT):
        return old
    if key.endswith("norm.weight") or key.endswith("norm_weight"):
        last = key == "decoder.final_layernorm.weight" and tied
        return _copies(old, -1, factor) / (factor if last else 1)
    if key.endswith(("word_embeddings.weight", "linear_qkv.bias")):
        return _copies(old, -1, factor)
    if key.endswith(WITHOUT_COPIES):
        return _shared(old, factor, name, seed)
    if key.endswith(FC1):  # gate and up, each on its own
        halves = [_copies(half, -2, factor) for half in old.chunk(2, dim=-2)]
        return _shared(torch.cat(halves, dim=-2), factor, name, seed)
    if key.endswith(("linear_qkv.weight", *OUTPUT_PROJECTIONS)):
        return _shared(_copies(old, -2, factor), factor, name, seed)
    raise KeyError(f"{key} is not a tensor that can be widened")


def _copies(old: torch.Tensor, axis: int, factor: int) -> torch.Tensor:
    return torch.cat([old] * factor, dim=axis)


def _shared(old: torch.Tensor, factor: int, name: str, seed: int) -> torch.Tensor:
    """A matrix that reads copies: its columns for the copies of a unit sum to the old one."""
    columns, scale = old.shape[-1], SPREAD * float(old.float().std()) / factor
    wide = torch.empty(*old.shape[:-1], factor * columns, dtype=old.dtype)

    def drawn(copy: int) -> torch.Tensor:
        return torch.randn(old.shape, generator=named_generator(f"{name}/{copy % factor}", seed))

    for copy in range(factor):
        apart = drawn(copy).sub_(drawn(copy + 1)).mul_(scale)  # they sum to 0 around the circle
        torch.add(apart, old, alpha=1 / factor, out=apart)
        wide[..., copy * columns : (copy + 1) * columns] = apart
    return wide
