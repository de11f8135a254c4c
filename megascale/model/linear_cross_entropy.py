"""The loss from hidden states and output weights, without the logits of all tokens.

The product with the output weights, the softmax and the products of the backward pass are computed
for a chunk of tokens at a time, and only the chunk's logits exist. The forward pass computes the
gradients too. So it multiplies 6 times per weight and token, as a pass that keeps all logits does.
Logits computed again in the backward pass would be 8, and save one fp32 gradient of the output
weights. At 1B parameters and 128K ids these two are 7 % of a step, so gradients are kept instead.

Shape suffixes: T tokens, C tokens of a chunk, D hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megascale.model.counts import loss_chunk_tokens


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the vocabulary for which this rank computes logits."""

    rows: int
    """Rows of the output weights that are multiplied, the first ones. The same on all ranks."""
    known: int
    """Of these the first so many belong to ids. The others have probability 0."""
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
            if gradients is None:
                losses[chunk] = _losses(*given, part)
            else:
                into = gradients[0][chunk], gradients[1][: part.rows]
                losses[chunk] = _losses(*given, part, into)
        ctx.gradients, ctx.weight = gradients, weight
        return (losses * mask).sum()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: a second backward pass has no gradients")
        hidden, for_weight = ctx.gradients
        ctx.gradients = None
        for_weight = _accumulated(ctx.weight, for_weight, gradient)
        return hidden.mul_(gradient), for_weight, None, None, None, None


def _accumulated(weight: Any, gradient_VD: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """What autograd is given for `weight`, of which `factor * gradient_VD` is the gradient.

    Where megatron-core reduces gradients the product goes straight to its fp32 buffer, as from its
    own fused linear layers. Then autograd gets zeros, which take no memory: a tied embedding adds
    its part to them, and the hook that announces a gradient wants one.
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
    gradients: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Losses (C) of a chunk.

    The gradients of the masked sum are written to the first of `gradients` (C, D) and added to the
    second (V, D). The mask is applied on the narrow sides of the products.
    """
    exact = torch.promote_types(hidden_CD.dtype, torch.float32)
    logits_CV = (hidden_CD @ weight_VD.T).to(exact)
    logits_CV[:, part.known :] = -math.inf
    place = _place(targets_C, part)
    losses_C, scale_C1 = _exponentiate(logits_CV, place, part.group)
    if gradients is None:
        return losses_C
    _differentiate(logits_CV, place, scale_C1)
    logits_CV = logits_CV.to(hidden_CD.dtype)
    torch.mm(logits_CV, weight_VD, out=gradients[0])
    gradients[0].mul_(mask_C[:, None])
    counted_CD = (hidden_CD * mask_C[:, None]).to(hidden_CD.dtype)
    _add_product(gradients[1], logits_CV.T, counted_CD)
    return losses_C


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, where `total` may have a higher precision."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _chunks(tokens: int, rows: int, element_bytes: int) -> Iterator[slice]:
    """At least one, so that no tokens have gradients too."""
    step = loss_chunk_tokens(rows, element_bytes)
    for start in range(0, max(tokens, 1), step):
        yield slice(start, min(start + step, tokens))


def _place(targets_C: torch.Tensor, part: VocabularyPart) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, 1): the row of each target, 0 where another rank has it; whether this rank has it."""
    row_C1 = (targets_C - part.first)[:, None]
    is_mine_C1 = (row_C1 >= 0) & (row_C1 < part.rows)
    return row_C1.where(is_mine_C1, 0), is_mine_C1


def _exponentiate(
    logits_CV: torch.Tensor,
    place: tuple[torch.Tensor, torch.Tensor],
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (C), and the factor (C, 1) that makes probabilities of what `logits_CV` become:
    exponentials over this rank's largest."""
    row_C1, is_mine_C1 = place
    lowest = torch.finfo(logits_CV.dtype).min  # a rank may have padded rows alone, all -inf
    most_C1 = logits_CV.amax(dim=-1, keepdim=True).clamp_(min=lowest)
    target_C1 = logits_CV.gather(1, row_C1).where(is_mine_C1, 0)
    logits_CV.sub_(most_C1).exp_()
    total_C1 = logits_CV.sum(dim=-1, keepdim=True)
    if group is None:
        return (total_C1.log() + most_C1 - target_C1)[:, 0], total_C1.reciprocal()
    highest_C1 = most_C1.clone()
    dist.all_reduce(highest_C1, op=dist.ReduceOp.MAX, group=group)
    to_highest_C1 = (most_C1 - highest_C1).exp_()
    sums_2C1 = torch.stack([total_C1 * to_highest_C1, target_C1])
    dist.all_reduce(sums_2C1, group=group)
    total_C1, target_C1 = sums_2C1
    return (total_C1.log() + highest_C1 - target_C1)[:, 0], to_highest_C1 / total_C1


def _differentiate(
    exponentials_CV: torch.Tensor,
    place: tuple[torch.Tensor, torch.Tensor],
    scale_C1: torch.Tensor,
) -> None:
    """Turn them into the gradient of the loss: probabilities, less 1 at the target."""
    row_C1, is_mine_C1 = place
    exponentials_CV.mul_(scale_C1)
    exponentials_CV.scatter_add_(1, row_C1, -is_mine_C1.to(exponentials_CV.dtype))
