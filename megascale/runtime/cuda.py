"""megatron-core on a machine with CUDA: what a run sets before its first tensor on a device."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

from megascale.runtime.megatron import fill_gaps

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"
"""Lengths differ from micro-batch to micro-batch. With segments that grow, freed memory of one
length serves another length."""

WORKSPACE_VARIABLE, WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""Of cuBLAS, which sums in one order only with work spaces of a fixed size (torch's notes on
reproducibility)."""


class Attention(NamedTuple):
    """A FlashAttention that torch can take in the place of its own, by the name in torch."""

    name: str
    module: str
    """The package that has it."""
    capabilities: tuple[int, ...]
    """Major compute capabilities of its devices."""
    most_head_dim: int
    takes_windows: bool


ATTENTIONS = (
    Attention("FA3", "flash_attn_interface", (9,), 256, True),
    Attention("FA4", "flash_attn.cute", (9, 10), 128, False),
)
"""The first that fits is taken. torch calls both prototypes, the second more so."""


def prepare() -> None:
    """Set the allocator, unless the user did, and change what does not fit in megatron-core.

    To be called before the first tensor on a device. Calling it again does nothing.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
    fill_gaps()


def use_fastest_attention(device: torch.device, head_dim: int, windowed: bool) -> str | None:
    """Let torch's attention run an installed FlashAttention 3 or 4: its name; None where none fits.

    It replaces the operators that `mesh.kernels` calls. One that cannot be loaded is left out,
    with a warning. Calling it again does nothing.
    """
    from torch.nn import attention

    major, _ = torch.cuda.get_device_capability(device)
    for found in ATTENTIONS:
        fits = major in found.capabilities and head_dim <= found.most_head_dim
        if not fits or (windowed and not found.takes_windows) or not _is_installed(found.module):
            continue
        try:
            if attention.current_flash_attention_impl() != found.name:
                attention.activate_flash_attention_impl(found.name)
        except (ImportError, RuntimeError, ValueError) as error:
            logging.getLogger(__name__).warning("%s is not used: %s", found.name, error)
        else:
            return found.name
    return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


def compute_deterministically() -> None:
    """Let torch take only operations that give the same bits every time (`train.deterministic`).

    To be called before the first matrix product. torch does not fill memory that nothing has
    written yet, which it would do by default.
    """
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
