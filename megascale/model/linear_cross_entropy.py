"""The loss from hidden states and output weights, without the logits of all tokens.

The product with the output weights, the softmax and the products of the backward pass are computed
for a chunk of tokens at a time, and only the chunk's logits exist. The forward pass computes the
gradients too. So it multiplies 6 times per weight and token, as a pass that keeps all logits does.
Logits computed again in the backward pass would be 8, and save one fp32 gradient of the output
weights. At 1B parameters and 128K ids these two are 7 % of a step, so gradients are kept instead.

Shape suffixes: T tokens, C tokens of a chunk, D hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megascale.fused.softmax import Softmax, differentiate, summarise
from megascale.fused.weight_gradient import add_product
from megascale.model.counts import loss_chunk_tokens


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the vocabulary for which this rank computes logits."""

    rows: int
    """Rows of the output weights that are multiplied, the first ones. The same on all ranks."""
    known: int
    """The first `known` of these rows belong to ids. The others have probability 0."""
    first: int = 0
    """Id of the first row."""
    group: dist.ProcessGroup | None = None
    """Tensor ranks that hold the other rows; None: there are none."""


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    part: VocabularyPart,
) -> torch.Tensor:
    """The cross-entropy of `targets_T` (nats), times `loss_mask_T`, summed over tokens: a scalar.

    It is in fp32, or in fp64 for tensors of fp64. Logits are hidden_TD @ weight_VD.T. All ranks of
    `part.group` call it with the same tokens, and get the same sum. The gradient of `hidden_TD` is
    this rank's part, to be summed over the group. No gradient flows to the mask.
    A backward pass may run once.
    """
    needed = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    total: torch.Tensor = _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, loss_mask_T, part, needed
    )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, mask, part, needed):  # type: ignore[no-untyped-def]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        gradients = None
        if needed:
            gradients = (torch.empty_like(hidden), torch.zeros_like(weight, dtype=exact))
        for chunk in _chunks(len(hidden), part.rows, hidden.element_size()):
            given = hidden[chunk], weight[: part.rows], targets[chunk], mask[chunk]
            into = gradients and (gradients[0][chunk], gradients[1][: part.rows])
            losses[chunk] = _losses(*given, part, into)
        ctx.gradients, ctx.weight = gradients, weight
        return (losses * mask).sum()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: a second backward pass has no gradients")
        hidden, for_weight = ctx.gradients
        ctx.gradients = None
        if ctx.needs_input_grad[1]:
            for_weight = _accumulated(ctx.weight, for_weight, gradient)
        return hidden.mul_(gradient), for_weight, None, None, None, None


def _accumulated(weight: Any, gradient_VD: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """What autograd gets as the gradient of `weight`, which is `factor * gradient_VD`.

    Where megatron-core reduces gradients, the product is added to its fp32 buffer, as its own fused
    linear layers do. Then autograd gets zeros, which take no memory: a tied embedding adds its part
    to them, and megatron-core's hook needs a gradient.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return gradient_VD.mul_(factor)
    weight.main_grad.addcmul_(gradient_VD, factor)
    weight.grad_added_to_main_grad = True
    return weight.new_zeros(()).expand_as(weight)


def _losses(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_C: torch.Tensor,
    mask_C: torch.Tensor,
    part: VocabularyPart,
    gradients: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Losses (C) of a chunk.

    The gradients of the masked sum are written to the first of `gradients` (C, D) and added to the
    second (V, D). The mask is applied on the narrow sides of the products.
    """
    rows_C = _rows(targets_C, part)
    softmax = summarise(hidden_CD @ weight_VD.T, part.known, rows_C)
    losses_C, scale_C = _over_ranks(softmax, part.group)
    if gradients is None:
        return losses_C
    gradient_CV = differentiate(softmax, scale_C, part.known, rows_C, hidden_CD.dtype)
    del softmax
    torch.mm(gradient_CV, weight_VD, out=gradients[0])
    gradients[0].mul_(mask_C[:, None])
    counted_CD = torch.mul(hidden_CD, mask_C[:, None], out=torch.empty_like(hidden_CD))
    add_product(gradients[1], gradient_CV.T, counted_CD)
    return losses_C


def _chunks(tokens: int, rows: int, element_bytes: int) -> Iterator[slice]:
    """At least one, so that no tokens have gradients too."""
    step = loss_chunk_tokens(rows, element_bytes)
    for start in range(0, max(tokens, 1), step):
        yield slice(start, min(start + step, tokens))


def _rows(targets_C: torch.Tensor, part: VocabularyPart) -> torch.Tensor:
    """The row of each target; -1 where another rank has it."""
    rows_C = targets_C - part.first
    return rows_C.where((rows_C >= 0) & (rows_C < part.rows), -1)


def _over_ranks(
    softmax: Softmax, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (C) over the rows of all ranks, and the factor (C) that makes probabilities of this
    rank's exponentials."""
    most_C, total_C, target_C = softmax.most_C, softmax.total_C, softmax.target_C
    if group is None:
        return total_C.log() + most_C - target_C, total_C.reciprocal()
    highest_C = most_C.clone()
    dist.all_reduce(highest_C, op=dist.ReduceOp.MAX, group=group)
    to_highest_C = (most_C - highest_C).exp_()
    sums_2C = torch.stack([total_C * to_highest_C, target_C])
    dist.all_reduce(sums_2C, group=group)
    total_C, target_C = sums_2C
    return total_C.log() + highest_C - target_C, to_highest_C / total_C
