"""In which order a pipeline runs waves of different lengths.

While a pipeline fills and drains, stages wait for its first and last waves. So these are the
shortest, and the longest waves are in the middle, where the work of others hides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megascale.planner.cost import FORWARD_SHARE
from megascale.planner.timeline import one_forward_one_backward


def order_waves(wave_s: Sequence[float], stages: int) -> tuple[list[list[int]], float]:
    """Orders of execution of waves that take `wave_s` seconds on each stage, and the seconds of a
    step in the first of them, which is the best.

    Tried are the longest first and two orders that rise and fall. The longest first is always
    among those returned: ranks that are done with their part of a wave begin the next one, which
    the seconds leave out, and in this order they gain most from it.
    """
    falling = sorted(range(len(wave_s)), key=lambda wave: -wave_s[wave])
    if stages == 1:
        return [falling], sum(wave_s)
    orders = [falling, falling[1::2][::-1] + falling[::2], falling[::2][::-1] + falling[1::2]]
    seconds = [pipeline_s([wave_s[wave] for wave in order], stages) for order in orders]
    best = min(range(3), key=seconds.__getitem__)
    return [orders[best], falling][: 1 + (best > 0)], seconds[best]


def pipeline_s(wave_s: Sequence[float], stages: int) -> float:
    """Seconds of a step of `stages` stages that run waves of `wave_s` seconds in this order (1F1B).

    The ranks of a wave are taken to begin together, so no plan in these waves takes longer.
    """
    if stages == 1:
        return sum(wave_s)
    count = len(wave_s)
    shares = ([s * FORWARD_SHARE for s in wave_s], [s * (1 - FORWARD_SHARE) for s in wave_s])
    free_s = [0.0] * stages
    done_s = [[0.0] * (count * (stages + 2)), [0.0] * (count * (stages + 2))]
    for stage, backward, index in _order(stages, count):
        # a stage's forward follows that of the stage before it, its backward that of the next
        mine = (stage + 1) * count + index
        done = done_s[backward]
        before = done[mine + count if backward else mine - count]
        begin = free_s[stage]
        if before > begin:
            begin = before
        free_s[stage] = done[mine] = begin + shares[backward][index]
    return max(free_s)


@lru_cache(maxsize=64)
def _order(stages: int, count: int) -> tuple[tuple[int, int, int], ...]:
    return tuple(one_forward_one_backward(stages, count))
