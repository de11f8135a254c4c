"""Deeper models by a learned map (G_learn; LiGO, arXiv 2303.00980, over depth).

Each tensor of a new layer is a linear combination of that tensor in all layers of the base. The
numbers of these combinations, a matrix (new layers, old layers) for each tensor, are learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megascale.checkpoint.boxes import Box, boxes
from megascale.checkpoint.tensors import Piece, Tensors
from megascale.growth.layer_orders import stacked
from megascale.growth.tensor_names import is_layered
from megascale.model.model import Model

Maps = Mapping[str, torch.Tensor]
"""By tensor, the part (new layers, old layers), fp32, that each new layer takes of each old one."""


def combined(base: Tensors, factor: int, maps: Maps) -> Iterator[Piece]:
    """The grown checkpoint; what no map speaks of is as in `stack`."""
    for key, shape in base.shapes.items():
        whole = base.read(key)
        if not is_layered(key):
            yield Piece.whole(key, whole)
            continue
        for target, source in enumerate(stacked(shape[0], factor)):
            new = whole[source]
            if key in maps:
                new = torch.tensordot(maps[key][target], whole.float(), 1).to(whole.dtype)
            offset = (target, *(0 for _ in shape[1:]))
            yield Piece(key, (factor * shape[0], *shape[1:]), offset, new[None].contiguous())


class DepthMaps:
    """The maps of a base, on this process, over a model of the grown shape that they fill.

    Its gradients are those of the model's weights, projected: the part that layer t takes of layer
    j has the gradient <dL/dW_t, B_j>.
    """

    def __init__(self, base: Tensors, model: Model, factor: int) -> None:
        found = boxes(model, None)
        self._boxes = [box for box in found if hasattr(box.holder(), "main_grad")]
        keys = {box.key for box in self._boxes if is_layered(box.key)}
        device = self._boxes[0].holder().device
        self._base = {key: base.read(key).float().to(device) for key in sorted(keys)}
        self.maps = {key: _stack(len(old), factor).to(device) for key, old in self._base.items()}
        """They begin as the map of `stack`."""
        for box in found:
            if box.key not in self.maps:
                box.live().copy_(_without_map(base, box, factor))

    @torch.no_grad()
    def fill(self) -> None:
        """Give the model the weights that the maps say."""
        for box, part, old in self._learned():
            box.live().copy_(torch.tensordot(part, old, 1)[None])

    @torch.no_grad()
    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the summed loss, from the gradients that the model's weights hold."""
        found = {key: torch.zeros_like(one) for key, one in self.maps.items()}
        for box, _, old in self._learned():
            weight: Any = box.holder()  # megatron-core gives it main_grad
            flat = weight.main_grad.view(-1)[box.start : box.start + old[0].numel()]
            found[box.key][box.offset[0]] += old.flatten(1) @ flat.float()
        return found

    def _learned(self) -> Iterator[tuple[Box, torch.Tensor, torch.Tensor]]:
        """(box of one layer, its parts of the old layers, that box of the old layers)."""
        for box in self._boxes:
            if box.key in self.maps:
                inner = zip(box.offset[1:], box.shape[1:], strict=True)
                place = (slice(None), *(slice(start, start + size) for start, size in inner))
                yield box, self.maps[box.key][box.offset[0]], self._base[box.key][place]


def _stack(num_layers: int, factor: int) -> torch.Tensor:
    return torch.eye(num_layers)[stacked(num_layers, factor)]


def _without_map(base: Tensors, box: Box, factor: int) -> torch.Tensor:
    if not is_layered(box.key):
        return base.read(box.key, box.offset, box.shape)
    source = stacked(base.shapes[box.key][0], factor)[box.offset[0]]
    return base.read(box.key, (source, *box.offset[1:]), box.shape)
