"""More rows for the ids of a larger vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megascale.checkpoint.tensors import Piece, Tensors
from megascale.growth.tensor_names import is_layered
from megascale.model.initialise import named_generator
from megascale.model.vocabulary import VOCABULARY


def resize(base: Tensors, old: int, new: int, noise: float = 0.0, seed: int = 0) -> Iterator[Piece]:
    """The base's tensors, with rows for `new` ids, of which the first `old` stay.

    A new row is the mean of the old ones: a new id is then neither likely nor
    unlikely, and all new ones are alike. `noise` a tells them apart: a times the deviation of the
    old rows, drawn anew for each number.
    """
    for key, shape in base.shapes.items():
        if key in VOCABULARY:
            yield Piece.whole(key, _resized(key, base.read(key)[:old], new, noise, seed))
        else:
            yield from _copied(base, key, shape)


def resize_moment(moment: Tensors, old: int, new: int) -> Iterator[Piece]:
    """The optimizer's moments of those: zeros for new rows."""
    for key, shape in moment.shapes.items():
        if key in VOCABULARY:
            kept = moment.read(key)[:old]
            zeros = kept.new_zeros(new - old, kept.shape[1])
            yield Piece.whole(key, torch.cat([kept, zeros]))
        else:
            yield from _copied(moment, key, shape)


def _resized(key: str, kept: torch.Tensor, rows: int, noise: float, seed: int) -> torch.Tensor:
    exact = kept.float()
    new = exact.mean(dim=0).expand(rows - len(kept), -1)
    if noise:
        drawn = torch.randn(new.shape, generator=named_generator(key, seed))
        new = new + noise * exact.std(dim=0) * drawn
    return torch.cat([kept, new.to(kept.dtype)])


def _copied(base: Tensors, key: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    if not is_layered(key):
        yield Piece.whole(key, base.read(key))
        return
    for layer in range(shape[0]):
        offset = (layer, *(0 for _ in shape[1:]))
        yield Piece(key, shape, offset, base.read(key, (layer,), (1,)))
