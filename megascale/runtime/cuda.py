"""megatron-core on a machine with CUDA: what a run sets before its first tensor on a device."""

from __future__ import annotations

import os

import torch

from megascale.runtime.megatron import fill_gaps

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"
"""Lengths differ from micro-batch to micro-batch. With segments that grow, freed memory of one
length serves another length."""

WORKSPACE_VARIABLE, WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""Of cuBLAS, which sums in one order only with work spaces of a fixed size (torch's notes on
reproducibility)."""


def prepare() -> None:
    """Set the allocator, unless the user did, and change what does not fit in megatron-core.

    To be called before the first tensor on a device. Calling it again does nothing.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
    fill_gaps()


def compute_deterministically() -> None:
    """Let torch take only operations that give the same bits every time (`train.deterministic`).

    To be called before the first matrix product. torch does not fill memory that nothing has
    written yet, which it would do by default.
    """
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
