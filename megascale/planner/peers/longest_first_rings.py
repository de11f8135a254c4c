"""Longest processing time first (Graham's rule) on rings of one size.

A run names these planners as `module:function`. They run at least as many micro-batches as a
pipeline has stages, if there are sequences for it.
"""

from __future__ import annotations

import heapq
import time

from megascale.planner.peers.static import place_groups, static_sizes
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import complete
from megascale.planner.problem import Problem


def plan_longest_first_rings(problem: Problem) -> StepPlan:
    """Plan a step with the smallest ring size that divides the ranks and holds every sequence.

    A sequence goes to the least busy ring, there into the first micro-batch with room. Raises
    UserError where a sequence is too long for all ranks.
    """
    size = static_sizes(problem)[0]
    return _plan(problem, size, _stage_room(problem, size), time.perf_counter())


def plan_longest_first_rings_best(problem: Problem) -> StepPlan:
    """`plan_longest_first_rings` with the ring size that proves best for this batch, mode and cost.

    Micro-batches hold what memory allows or what a pipeline asks for, whichever proves better.
    """
    began = time.perf_counter()
    plans = [
        _plan(problem, size, room, began)
        for size in static_sizes(problem)
        for room in {size * problem.capacity, _stage_room(problem, size)}
    ]
    return min(plans, key=lambda plan: plan.predicted_s)


def _plan(problem: Problem, size: int, room: int, began: float) -> StepPlan:
    return complete(problem, place_groups(problem, size, _deal(problem, size, room)), began)


def _stage_room(problem: Problem, size: int) -> int:
    """Most tokens of a micro-batch, so that every ring has one for each pipeline stage."""
    room = size * problem.capacity
    if problem.pipeline == 1:
        return room
    even = -(-int(problem.lengths.sum()) * size // (problem.num_ranks * problem.pipeline))
    return min(room, max(even, int(problem.lengths.max(initial=1))))


def _deal(problem: Problem, size: int, room: int) -> list[list[list[int]]]:
    """Sequences of each micro-batch of each ring, with at most `room` tokens in a micro-batch.

    A sequence above the room, which offload makes fit, gets a micro-batch of its own.
    """
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
    return groups
