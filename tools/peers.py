"""Planners of others that no run can name, behind the same interface as those of the package.

`verl_kk` stays here because its plans may exceed the capacity, and a run refuses such plans.
`megatron_core` stays here because it imports megatron-core, and the planners of the package need
NumPy only.

`verl_kk` is written from its description and runs at least as many micro-batches as a pipeline has
stages, if there are sequences for it: verl has a setting for the tokens of a micro-batch.
`megatron_core` runs the scheduler of the installed megatron-core, which refuses pipelines. Both
decide the same in every mode; what they decide is completed for the mode asked.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from itertools import count

from megascale.planner import Placed, Planner, Problem, StepPlan, complete
from megascale.planner.peers.dhp import plan_dhp
from megascale.planner.peers.longest_first_rings import (
    plan_longest_first_rings,
    plan_longest_first_rings_best,
)
from megascale.planner.peers.static import static_sizes
from megascale.planner.peers.wlb_llm import plan_wlb_llm

VERL_LINEAR = 24576
"""verl's workload of s tokens is 24576 s + s^2."""


def _in_step(groups: Sequence[Sequence[list[int]]], size: int) -> Iterator[Placed]:
    """First micro-batches of all groups of consecutive ranks, then second ones, and so on."""
    for turn in range(max((len(group) for group in groups), default=0)):
        for position, group in enumerate(groups):
            if turn < len(group) and group[turn]:
                yield Placed(range(position * size, (position + 1) * size), group[turn])


def plan_verl_kk(problem: Problem) -> StepPlan:
    """Karmarkar-Karp twice, as verl does: equal counts for static rings, then micro-batches.

    All rings run as many micro-batches as the fullest needs by its tokens, and as a pipeline has
    stages if every ring has so many sequences. A micro-batch may hold more than its capacity: verl
    does not look. Sequences are padded with empty ones where the rings do not divide their number.
    """
    began = time.perf_counter()
    size = static_sizes(problem)[0]
    lengths, num_groups = problem.lengths.tolist(), problem.num_ranks // size
    work = [VERL_LINEAR * s + s * s for s in lengths]
    work += [0] * (-len(work) % num_groups)
    parts = karmarkar_karp(work, num_groups, equal_counts=True)
    parts = [[i for i in part if i < len(lengths)] for part in parts]
    fullest = max(sum(lengths[i] for i in part) for part in parts)
    num_micro_batches = -(-fullest // (size * problem.capacity))
    num_micro_batches = max(num_micro_batches, min(problem.pipeline, *map(len, parts)))
    groups = []
    for part in parts:
        own = [work[i] for i in part]
        split = karmarkar_karp(own, num_micro_batches, equal_counts=False)
        micro_batches = [[part[k] for k in one] for one in split]
        micro_batches.sort(key=lambda one: -sum(work[i] for i in one))
        groups.append(micro_batches[::2][::-1] + micro_batches[1::2])  # small ones at both ends
    return complete(problem, list(_in_step(groups, size)), began)


def karmarkar_karp(weights: Sequence[int], num_parts: int, equal_counts: bool) -> list[list[int]]:
    """Indices of `weights` in `num_parts` parts of nearly equal sums.

    The largest differencing method: of the two partial partitions that are most uneven, the
    heaviest part of one joins the lightest of the other. With `equal_counts` (of a multiple of
    `num_parts`) they begin as runs of the sorted weights, else as single weights.
    """
    order = sorted(range(len(weights)), key=lambda i: (weights[i], i))
    run = num_parts if equal_counts else 1
    tie = count()
    heap = []
    for begin in range(0, len(order), run):
        parts = [(weights[i], [i]) for i in order[begin : begin + run]]
        parts += [(0, [])] * (num_parts - len(parts))
        heap.append(_state(parts, tie))
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = zip(first, reversed(second), strict=True)
        heapq.heappush(heap, _state([(a + b, own + other) for (a, own), (b, other) in merged], tie))
    return [indices for _, indices in heap[0][2]] if heap else [[] for _ in range(num_parts)]


Part = tuple[int, list[int]]


def _state(parts: list[Part], tie: Iterator[int]) -> tuple[int, int, list[Part]]:
    """A partial partition, heaviest part first, keyed by how uneven it is."""
    parts.sort(key=lambda part: -part[0])
    return parts[-1][0] - parts[0][0], next(tie), parts


class NoCommunicatorError(RuntimeError):
    """megatron-core's scheduler wants a ring for which megatron-core makes no communicator."""


class _Group:
    """All that the scheduler asks of its process group."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks

    def size(self) -> int:
        return self._num_ranks


def import_megatron_core() -> type:
    """BalancedCPScheduler of the installed megatron-core, which takes seconds to import."""
    from megascale.runtime import distributed

    distributed.prepare_device("auto")
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

    return BalancedCPScheduler


def plan_megatron_core(problem: Problem) -> StepPlan:
    """megatron-core's own BalancedCPScheduler, every sub-sample a micro-batch as it runs them.

    The barrier that megatron-core puts behind each of its groups is not charged. Raises
    NoCommunicatorError for rings that could not run, and whatever the scheduler raises.
    """
    scheduler = import_megatron_core()
    began = time.perf_counter()
    group = _Group(problem.num_ranks)
    samples = list(enumerate(problem.lengths.tolist()))
    _, by_group = scheduler(problem.capacity, group).get_groups_and_subsamples(samples, None)
    placed = []
    for by_rank in by_group:
        members: dict[int, list[int]] = {}
        for rank, sequences in enumerate(by_rank):
            for sequence in sequences:
                members.setdefault(sequence, []).append(rank)
        placed += [Placed(ranks, [sequence]) for sequence, ranks in members.items()]
    for ranks, _, _ in placed:
        _require_communicator(ranks, problem.num_ranks)
    return complete(problem, placed, began)


def _require_communicator(ranks: Sequence[int], num_ranks: int) -> None:
    """As in megatron-core's create_hybrid_dp_cp_groups: aligned blocks of powers of two."""
    size, first = len(ranks), ranks[0]
    largest = 2 ** (int(math.log2(num_ranks)) - 1)
    is_block = list(ranks) == list(range(first, first + size)) and first % size == 0
    made = size.bit_count() == 1 and size <= largest and is_block
    if size > 1 and size != num_ranks and not made:
        raise NoCommunicatorError(f"{size} ranks from {first} of {num_ranks}")


PEERS: dict[str, Planner] = {
    "lpt": plan_longest_first_rings,
    "lpt_best": plan_longest_first_rings_best,
    "verl_kk": plan_verl_kk,
    "megatron_core": plan_megatron_core,
    "wlb_llm": plan_wlb_llm,
    "dhp": plan_dhp,
}
"""By the name that the bench gives."""
