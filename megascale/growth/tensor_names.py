"""What the tensors of a checkpoint are, by their names."""

from __future__ import annotations

from megascale.model.initialise import CLOSED_TOKENS

LAYERS = "decoder.layers."
CLOSED = f"{LAYERS}{CLOSED_TOKENS}"
FC1, FC2 = "linear_fc1.weight", "linear_fc2.weight"


def is_layered(key: str) -> bool:
    """Whether the first axis of a tensor is the layers."""
    return key.startswith(LAYERS)
