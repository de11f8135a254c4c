"""megatron-core on a machine with CUDA: what a run sets before its first tensor on a device."""

from __future__ import annotations

import os

from megascale.runtime.megatron import fill_gaps

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"
"""Lengths differ from micro-batch to micro-batch. With segments that grow, freed memory of one
length serves another length."""


def prepare() -> None:
    """Set the allocator, unless the user did, and change what does not fit in megatron-core.

    To be called before the first tensor on a device. Calling it again does nothing.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
    fill_gaps()
