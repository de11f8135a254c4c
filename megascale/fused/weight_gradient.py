"""Gradients of weights, added to their fp32 sums by the product that computes them.

megatron-core does so with a library that few machines have. Without it, the gradient is written in
the precision of the weight, rounded so, and read again to be added.

Shape suffixes: N tokens, O outputs, D inputs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def add_product(total_OD: torch.Tensor, left_ON: torch.Tensor, right_ND: torch.Tensor) -> None:
    """total += left @ right, where `total` may have a higher precision."""
    if left_ON.is_cuda and left_ON.dtype != total_OD.dtype:
        torch.addmm(total_OD, left_ON, right_ND, out_dtype=total_OD.dtype, out=total_OD)
    else:
        total_OD.addmm_(left_ON.to(total_OD.dtype), right_ND.to(total_OD.dtype))


def use_in_megatron() -> None:
    """Let linear layers of megatron-core with `gradient_accumulation_fusion` add gradients so.

    The names here are in every supported version. Calling it again does nothing.
    """
    import megatron.core.tensor_parallel.layers as layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add)
        layers._grad_accum_fusion_available = True
    plain = layers.LinearWithGradAccumulationAndAsyncCommunication
    if not hasattr(plain, "keeps_weight"):
        layers.LinearWithGradAccumulationAndAsyncCommunication = _keeping_weight(plain)


def _add(input_ND: torch.Tensor, gradient_NO: torch.Tensor, total_OD: torch.Tensor) -> None:
    """In the place of apex's kernel."""
    add_product(total_OD, gradient_NO.T, input_ND)


def _keeping_weight(linear: Any) -> Any:
    """megatron-core's linear layer, which works where saved tensors are offloaded too.

    Its backward pass takes the weight from the saved tensors and marks it as added. With hooks of
    saved tensors this is another object than the weight, whose gradient would then be missing.
    """

    class Linear(linear):  # type: ignore[misc]
        keeps_weight = True

        @staticmethod
        def forward(ctx, x, weight, bias, fused, *options):  # type: ignore[no-untyped-def]
            ctx.weight, ctx.fused = weight, fused and hasattr(weight, "main_grad")
            return linear.forward(ctx, x, weight, bias, ctx.fused, *options)

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            for_x, for_weight, *others = linear.backward(ctx, gradient)
            if ctx.fused and for_weight is None:
                for_weight = torch.empty_like(ctx.weight)  # megatron-core's hook wants something
                ctx.weight.grad_added_to_main_grad = True
            return for_x, for_weight, *others

    return Linear
