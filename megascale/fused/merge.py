"""Partial results of attention over different keys, joined by their log-sum-exp.

Shape suffixes: T tokens of the pack, Q tokens of the part, H query heads, D head size.
"""

from __future__ import annotations

import torch

from megascale.fused.choice import use_kernel


def merge(
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    rows: slice | torch.Tensor,
    part_QHD: torch.Tensor,
    part_lse_QH: torch.Tensor,
) -> None:
    """Add a partial result to `rows` of `out_THD` and `lse_TH`, in place.

    The result is the softmax over the union of the keys seen so far. `rows` are a slice, or
    indices, each at most once. A log-sum-exp of -inf stands for no key; a part has one at least.
    """
    if use_kernel(out_THD):
        from megascale.fused.triton_merge import merge as launch

        first, indices = (rows.start or 0, None) if isinstance(rows, slice) else (0, rows)
        launch(out_THD, lse_TH, first, indices, part_QHD, part_lse_QH)
    else:
        merge_plain(out_THD, lse_TH, rows, part_QHD, part_lse_QH)


def merge_plain(
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    rows: slice | torch.Tensor,
    part_QHD: torch.Tensor,
    part_lse_QH: torch.Tensor,
) -> None:
    """The twin."""
    before, part_lse_QH = lse_TH[rows], part_lse_QH.to(lse_TH.dtype)
    weight = torch.sigmoid(part_lse_QH - before)[..., None]
    out_THD[rows] = torch.lerp(out_THD[rows], part_QHD.to(out_THD.dtype), weight)
    lse_TH[rows] = torch.logaddexp(before, part_lse_QH)
