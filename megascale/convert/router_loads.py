"""State of our routers that other formats lack: the loads of the experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megascale.checkpoint.tensors import Piece
from megascale.config import ModelConfig

LOADS = ("decoder.layers.mlp.router.load_E", "decoder.layers.mlp.router.earlier_E")


def even_loads(model: ModelConfig) -> Iterator[Piece]:
    """The loads of a complete model before training, 1 for every expert; nothing if it is dense."""
    if model.moe is not None:
        for name in LOADS:
            yield Piece.whole(name, torch.ones(model.num_layers, model.moe.num_experts))
