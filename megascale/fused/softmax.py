"""The softmax of a chunk of logits in two steps, between which tensor ranks may add up.

Shape suffixes: C tokens, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megascale.fused.choice import use_kernel


class Softmax(NamedTuple):
    """Results of the first step for the logits of this rank, by token (C)."""

    state_CV: torch.Tensor
    """For the second step. It may take the place of the logits."""
    most_C: torch.Tensor
    """The largest logit; a large negative number if no row belongs to an id."""
    total_C: torch.Tensor
    """The sum of exp(logit - most)."""
    target_C: torch.Tensor
    """The logit of the target; 0 where another rank has it."""


def summarise(logits_CV: torch.Tensor, known: int, rows_C: torch.Tensor) -> Softmax:
    """The first step. Logits from `known` on belong to no id. `rows_C` are the targets' rows,
    -1 where another rank has the target. Results are in fp32, or fp64 for logits in fp64."""
    if use_kernel(logits_CV):
        from megascale.fused.triton_softmax import summarise as launch

        return Softmax(logits_CV, *launch(logits_CV, known, rows_C))
    return summarise_plain(logits_CV, known, rows_C)


def differentiate(
    softmax: Softmax, scale_C: torch.Tensor, known: int, rows_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The second step: the gradient of the loss by the logits, in `dtype`.

    That is exp(logit - most) * scale, less 1 at the target. It takes the place of the state.
    """
    if use_kernel(softmax.state_CV):
        from megascale.fused.triton_softmax import differentiate as launch

        launch(softmax.state_CV, softmax.most_C, scale_C, known, rows_C)
        return softmax.state_CV
    return differentiate_plain(softmax.state_CV, scale_C, rows_C).to(dtype)


def summarise_plain(logits_CV: torch.Tensor, known: int, rows_C: torch.Tensor) -> Softmax:
    """The twin of the first step. Its state is the exponentials."""
    exact_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    exact_CV[:, known:] = -math.inf
    lowest = torch.finfo(exact_CV.dtype).min  # a rank may have padded rows alone, all -inf
    most_C1 = exact_CV.amax(dim=-1, keepdim=True).clamp_(min=lowest)
    target_C1 = exact_CV.gather(1, rows_C.clamp(min=0)[:, None])
    exact_CV.sub_(most_C1).exp_()
    target_C = target_C1[:, 0].where(rows_C >= 0, 0)
    return Softmax(exact_CV, most_C1[:, 0], exact_CV.sum(dim=-1), target_C)


def differentiate_plain(
    exponentials_CV: torch.Tensor, scale_C: torch.Tensor, rows_C: torch.Tensor
) -> torch.Tensor:
    """The twin of the second step, in place."""
    exponentials_CV.mul_(scale_C[:, None])
    ones_C = (rows_C >= 0).to(exponentials_CV.dtype)
    return exponentials_CV.scatter_add_(1, rows_C.clamp(min=0)[:, None], -ones_C[:, None])
