"""megatron-core on a machine with CUDA: what a run sets before its first tensor on a device."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from megascale.runtime.megatron import fill_gaps

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"
"""Lengths differ from micro-batch to micro-batch. With segments that grow, freed memory of one
length serves another length."""
COMPILED = (
    "swiglu bias_swiglu weighted_swiglu swiglu_back bias_swiglu_back weighted_swiglu_back"
).split()
"""Functions of megatron-core's fused SwiGLU, which it compiles."""


def prepare() -> None:
    """Set the allocator, unless the user did, and change what does not fit in megatron-core.

    To be called before the first tensor on a device. Calling it again does nothing.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
    fill_gaps()
    _compile_swiglu()


def _compile_swiglu() -> None:
    import megatron.core.fusions.fused_bias_swiglu as fused

    for name in COMPILED:
        setattr(fused, name, compiled_for_any_length(getattr(fused, name)))


def compiled_for_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors (T, ...), compiled once for all T above 1, and once for T = 1.

    torch would compile for the first T, for all others, and for 1. `function` may be the result
    of `torch.compile`, or of this function, which is then returned.
    """
    if hasattr(function, "for_any_length"):
        return function
    compiled = torch.compile(getattr(function, "_torchdynamo_orig_callable", function))

    @functools.wraps(function)
    def call(*tensors: torch.Tensor) -> Any:
        if not torch.compiler.is_compiling():  # called by another compiled function
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*tensors)

    call.for_any_length = True  # type: ignore[attr-defined]
    return call
