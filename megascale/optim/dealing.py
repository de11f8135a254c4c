"""Which rank of the HDP axis keeps the state of which weight, for optimizers of whole weights.

Such an optimizer needs whole matrices, so its state is not cut into ranges but dealt out, a weight
to a rank. Without torch: the plan of a run counts with the functions that build the optimizer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from megascale.config import Layout, RunConfig
from megascale.model.counts import padded_vocab_size
from megascale.model.matrices import Weight, weights

StateBytes = Callable[[Weight], int]
"""Bytes of an optimizer's state of one weight, without a master copy of the weight."""


def kept_bytes(config: RunConfig, weight: Weight, state_bytes: StateBytes) -> int:
    """Of the state of a weight and, in bf16, of its master copy."""
    has_master = config.train.precision == "bf16"
    return state_bytes(weight) + (4 * math.prod(weight.shape) if has_master else 0)


def deal(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank that keeps each of `sizes`: the largest first, each to the rank with the least."""
    held = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, owners[index] = held[0]
        heapq.heapreplace(held, (load + sizes[index], owners[index]))
    return owners


def dealt_bytes(config: RunConfig, layout: Layout, stage: int, state_bytes: StateBytes) -> int:
    """Bytes of state and master weights on the fullest rank of a pipeline stage.

    Without `optim.distributed_optimizer` every rank keeps those of all its weights.
    """
    rows = padded_vocab_size(config.model, layout.tensor)
    held = list(weights(config.model, layout, stage, rows))
    is_dealt = config.optim.distributed_optimizer
    loads = [0] * layout.hdp
    for is_expert, every in ((False, 1), (True, layout.expert)):
        mine = [weight for weight in held if weight.is_expert == is_expert]
        sizes = [kept_bytes(config, weight, state_bytes) for weight in mine]
        shares = [0 if is_dealt else sum(sizes)] * (layout.hdp // every)
        if is_dealt:
            for owner, size in zip(deal(sizes, len(shares)), sizes, strict=True):
                shares[owner] += size
        loads = [load + shares[rank // every] for rank, load in enumerate(loads)]
    return max(loads)
