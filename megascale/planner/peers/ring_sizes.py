"""How many ranks a sequence needs, with and without offload.

Source: ByteScale (arXiv 2502.21231), Eq. 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.planner.cost import FORWARD_SHARE, CostModel
from megascale.planner.problem import OffloadModel

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

ROUNDING = 5e-10
"""Relative excess that is taken for a rounding error; half of what `StepPlan.check` forgives."""


class RingSizes(NamedTuple):
    """Ring size D(s) and offload ratio r of each sequence."""

    ranks: Integers
    offload: Floats


def ring_ranks(lengths: ArrayLike, capacity: int, offload: ArrayLike, layers: int) -> Integers:
    """D(s) of Eq. 3 for given offload ratios; the arguments broadcast.

    ceil((2 Act(s) + (1 - r) (l - 2) Act(s)) / (l Act(C))) with Act proportional to tokens.
    """
    kept = 1 - np.asarray(offload, np.float64) * _may_leave(layers)
    filled = np.asarray(lengths, np.float64) * kept / capacity
    return np.maximum(1, np.ceil(filled * (1 - ROUNDING))).astype(np.int64)


def offload_to_fit(lengths: ArrayLike, room: ArrayLike, layers: int) -> Floats:
    """Least offload ratio with which sequences fit `room` tokens; above 1 where none does."""
    excess = np.maximum(0.0, 1 - np.asarray(room, np.float64) / np.asarray(lengths, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(excess > 0, excess / _may_leave(layers), 0.0)


def smallest_ring(
    lengths: ArrayLike,
    capacity: int,
    cost: CostModel,
    offload: OffloadModel | None = None,
    num_ranks: int | None = None,
    limit_s: float = math.inf,
) -> RingSizes:
    """Smallest ring of each sequence and the least offload that allows it (ByteScale, Eq. 3).

    Offload must hide behind compute, T(s) >= r Act(s) / B, and save a rank or more,
    r >= min(1, l Act(C) / ((l - 2) Act(s))); where no r does both, r = 0. The paper's T is the
    time of one layer; `cost` has that of all l layers of a stage, forward and backward, so T here
    is its forward part over l (copies to the host run in forward, which is the shorter). T and
    Act are of the whole sequence: a ring of D ranks divides both by D.

    Not in the paper: offload shrinks no ring so far that its sequence takes longer than `limit_s`,
    fixed and latency parts aside. Eq. 3 by itself gives 2M tokens as few ranks as 128K would get
    without offload, and they then work long after all the others are done.

    A sequence that needs more than `num_ranks` that way gets all of them and as much offload as
    memory asks for, hidden or not: there is no other way to run it.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    ranks, share = ring_ranks(tokens, capacity, 0.0, 2), np.zeros(tokens.shape)
    if offload is None or offload.stage_layers <= 2:
        return RingSizes(ranks, share)
    layers = offload.stage_layers
    forward_s = cost.compute_s(tokens) * FORWARD_SHARE / layers
    copy_s = tokens * offload.bytes_per_token / offload.copy_bytes_per_s
    most = np.minimum(1.0, forward_s / np.maximum(copy_s, np.finfo(np.float64).tiny))
    least = np.minimum(1.0, capacity / (tokens * _may_leave(layers)))
    smaller = ring_ranks(tokens, capacity, np.where(least <= most, most, 0.0), layers)
    work_s = cost.compute_s(tokens) + cost.transfer_inter * tokens
    smaller = np.clip(np.ceil(work_s / limit_s), smaller, ranks).astype(np.int64)
    enough = offload_to_fit(tokens, smaller * capacity, layers)
    share = np.where(smaller < ranks, np.clip(enough, least, most), 0.0)
    if num_ranks is not None:
        crowded = smaller > num_ranks
        enough = offload_to_fit(tokens, num_ranks * capacity, layers)
        share = np.where(crowded, np.minimum(enough, 1.0), share)
        smaller = np.minimum(smaller, num_ranks)
    return RingSizes(smaller, share)


def _may_leave(layers: int) -> float:
    """Part of the activations in layers that may offload: all but the first and the last."""
    return (layers - 2) / layers if layers > 2 else 0.0
