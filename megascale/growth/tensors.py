"""What the tensors of a checkpoint are, by their names."""

from __future__ import annotations

import hashlib

import torch

LAYERS = "decoder.layers."
FC1, FC2 = "linear_fc1.weight", "linear_fc2.weight"
OUTPUT_PROJECTIONS = ("linear_proj.weight", FC2)
"""What writes into the residual stream."""


def is_layered(key: str) -> bool:
    """Whether the first axis of a tensor is the layers."""
    return key.startswith(LAYERS)


def generator(name: str, seed: int = 0) -> torch.Generator:
    """Random numbers that depend on a name and a seed alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
