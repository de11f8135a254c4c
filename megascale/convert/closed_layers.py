"""Layers that growth has added and that are still masked, which no other format has."""

from __future__ import annotations

from megascale.checkpoint.tensors import Tensors
from megascale.errors import UserError
from megascale.model.initialise import CLOSED_TOKENS

CLOSED = f"decoder.layers.{CLOSED_TOKENS}"


def refuse_closed_layers(stored: Tensors) -> None:
    """Raise UserError where layers of a checkpoint are still masked."""
    if CLOSED in stored.shapes and bool(stored.read(CLOSED).any()):
        raise UserError(
            f"checkpoint {stored.found.folder} has layers that are still masked, which no family "
            f"has; train it for {int(stored.read(CLOSED).max()):,} more tokens"
        )
