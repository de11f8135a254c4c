"""Planners of others that are not part of the package, behind the same interface as ours.

`verl_kk`, `lpt` and `lpt_best` are written from their descriptions, `megatron_core` runs the
scheduler of the installed megatron-core. `verl_kk`, `lpt` and `lpt_best` run at least as many
micro-batches as a pipeline has stages, where there are sequences for it: how many tokens a
micro-batch holds is a setting of theirs. Beyond that only `lpt_best` knows modes: what the others
decide is completed for the mode asked. megatron-core's scheduler refuses pipelines.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from itertools import count

from megascale.planner import Placed, Planner, Problem, StepPlan, complete

VERL_LINEAR = 24576
"""verl's workload of s tokens is 24576 s + s^2."""


def static_sizes(problem: Problem) -> list[int]:
    """Ring sizes that divide the ranks and hold the longest sequence, smallest first."""
    problem.require_fit()
    longest = int(problem.lengths.max(initial=1))
    fewest = -(-longest // problem.capacity)
    sizes = range(fewest, problem.num_ranks + 1)
    return [size for size in sizes if problem.num_ranks % size == 0]


def _in_step(groups: Sequence[Sequence[list[int]]], size: int) -> Iterator[Placed]:
    """First micro-batches of all groups of consecutive ranks, then second ones, and so on."""
    for turn in range(max((len(group) for group in groups), default=0)):
        for position, group in enumerate(groups):
            if turn < len(group) and group[turn]:
                yield Placed(range(position * size, (position + 1) * size), group[turn])


def plan_lpt(problem: Problem) -> StepPlan:
    """Longest processing time first, on static rings as small as memory allows.

    A sequence goes to the least busy ring, there into the first micro-batch with room.
    """
    began = time.perf_counter()
    size = static_sizes(problem)[0]
    return complete(problem, _longest_first(problem, size, _stage_room(problem, size)), began)


def plan_lpt_best(problem: Problem) -> StepPlan:
    """`plan_lpt` with the static ring size that proves best for this batch, mode and cost.

    Micro-batches hold what memory allows or what a pipeline asks for, whichever proves better.
    """
    began = time.perf_counter()
    plans = [
        complete(problem, _longest_first(problem, size, room), began)
        for size in static_sizes(problem)
        for room in {size * problem.capacity, _stage_room(problem, size)}
    ]
    return min(plans, key=lambda plan: plan.predicted_s)


def _stage_room(problem: Problem, size: int) -> int:
    """Most tokens of a micro-batch, so that every ring has one for each pipeline stage."""
    room = size * problem.capacity
    if problem.pipeline == 1:
        return room
    even = -(-int(problem.lengths.sum()) * size // (problem.num_ranks * problem.pipeline))
    return min(room, max(even, int(problem.lengths.max(initial=1))))


def _longest_first(problem: Problem, size: int, room: int) -> list[Placed]:
    lengths = problem.lengths.tolist()
    seconds = (problem.cost.compute_s(problem.lengths) / size).tolist()
    groups: list[list[list[int]]] = [[] for _ in range(problem.num_ranks // size)]
    rooms: list[list[int]] = [[] for _ in groups]
    heap = [(0.0, position) for position in range(len(groups))]
    for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        busy_s, group = heap[0]
        own = rooms[group]
        fits = (k for k, left in enumerate(own) if left >= lengths[sequence])
        place = next(fits, len(own))
        if place == len(own):
            own.append(room)
            groups[group].append([])
            busy_s += problem.cost.fixed
        own[place] -= lengths[sequence]
        groups[group][place].append(sequence)
        heapq.heapreplace(heap, (busy_s + seconds[sequence], group))
    return list(_in_step(groups, size))


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
    "lpt": plan_lpt,
    "lpt_best": plan_lpt_best,
    "verl_kk": plan_verl_kk,
    "megatron_core": plan_megatron_core,
}
"""By name."""
