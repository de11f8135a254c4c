"""Rows in groups, each group with a matrix of its own: the linear layers of experts.

On CUDA all groups are one kernel, and where they begin is known to the device alone.

Shape suffixes: N rows in the order of their groups, E groups, D inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch

BLACKWELL = (10, 0)
"""Compute capability from which torch's kernel leaves the gradient of an empty group as the memory
was (pytorch issue 172439)."""
ALIGNED_BYTES = 16
"""Rows that the kernel reads begin at multiples of it."""


def grouped_linear(x_ND: torch.Tensor, weight: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """(N, O): each row times the transposed matrix of its group.

    `weight` is (E * O, D): the matrices of all groups on top of each other. `ends_E`, int32 on the
    device of `x_ND`, says where the rows of each group end; the last end is N. Groups may be empty.
    """
    output: torch.Tensor = _GroupedLinear.apply(x_ND, weight, ends_E)
    return output


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ends):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, ends)
        ctx.weight = weight  # itself: hooks of saved tensors would hand on another object
        return multiply(x, _stacked(weight, ends).transpose(1, 2), ends)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (x, ends), weight, for_x, for_weight = ctx.saved_tensors, ctx.weight, None, None
        gradient = gradient.contiguous()
        if ctx.needs_input_grad[0]:
            for_x = multiply(gradient, _stacked(weight, ends), ends)
        if ctx.needs_input_grad[1]:
            for_weight = multiply_by_group(gradient, x, ends).view_as(weight)
        return for_x, for_weight, None


def multiply(x_ND: torch.Tensor, matrices_EDO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """(N, O): each row times the matrix of its group."""
    if not len(x_ND):
        return x_ND.new_empty((0, matrices_EDO.shape[-1]))
    if has_kernel(x_ND):
        return torch.nn.functional.grouped_mm(x_ND, matrices_EDO, offs=ends_E)
    return torch.cat(
        [x_ND[rows] @ matrix for rows, matrix in zip(_rows(ends_E), matrices_EDO, strict=True)]
    )


def multiply_by_group(
    left_NO: torch.Tensor, right_ND: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """(E, O, D): the product over the rows of each group; zeros where a group is empty."""
    if not len(left_NO):
        return left_NO.new_zeros((len(ends_E), left_NO.shape[1], right_ND.shape[1]))
    if not has_kernel(left_NO):
        return torch.stack([left_NO[rows].T @ right_ND[rows] for rows in _rows(ends_E)])
    products_EOD = torch.nn.functional.grouped_mm(left_NO.T, right_ND, offs=ends_E)
    if torch.cuda.get_device_capability(left_NO.device) >= BLACKWELL:
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        products_EOD.masked_fill_(empty_E[:, None, None], 0)
    return products_EOD


def has_kernel(x: torch.Tensor) -> bool:
    """Whether torch has one kernel for all groups of such rows."""
    return x.is_cuda and x.dtype == torch.bfloat16


def _stacked(weight: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """(E, O, D): a view of the weight."""
    return weight.detach().view(len(ends_E), -1, weight.shape[1])


def _rows(ends_E: torch.Tensor) -> list[slice]:
    ends: list[Any] = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
