"""Whether a Triton kernel or its twin runs."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types that kernels read and write; they compute in fp32."""


def use_kernel(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is on CUDA, in a precision of kernels, and triton is installed."""
    return tensor.is_cuda and tensor.dtype in KERNEL_DTYPES and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
