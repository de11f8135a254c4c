"""Static context parallelism with packing: one ring size for all, as Megatron users run it."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.planner.bytescale import best_fit, offload_to_fit
from megascale.planner.placing import Placed, complete
from megascale.planner.plan import StepPlan
from megascale.planner.problem import Problem

Seconds = NDArray[np.float64]
Groups = list[list[list[int]]]
"""Sequences of each micro-batch of each group of ranks, in execution order."""


def plan_static(problem: Problem) -> StepPlan:
    """The baseline of ByteScale and FlexSP: one ring size, packing in order of arrival.

    The ring size is the smallest divisor of the number of ranks that holds the longest sequence;
    groups are consecutive ranks. Sequences are packed next fit up to what a group holds, and
    micro-batches are dealt to the groups in turn. Raises UserError where a sequence is too long
    for all ranks; one that fits them with offload only gets as much offload as it takes.
    """
    began = time.perf_counter()
    size = _sizes(problem)[0]
    return complete(problem, _placed(problem, size, _in_turn(problem, size)), began)


def plan_static_balanced(problem: Problem) -> StepPlan:
    """`plan_static` with best-fit packing, and the slowest micro-batch to the least busy group."""
    began = time.perf_counter()
    size = _sizes(problem)[0]
    return complete(problem, _placed(problem, size, _longest_first(problem, size)), began)


def plan_static_best(problem: Problem) -> StepPlan:
    """The best static plan with hindsight: of every ring size that fits and of both packings.

    No user knows it before the step; a planner that beats it owes nothing to a bad choice of the
    static ring size.
    """
    began = time.perf_counter()
    candidates = [
        (_busiest_s(problem, size, groups), size, groups)
        for size in _sizes(problem)
        for groups in (_longest_first(problem, size), _in_turn(problem, size))
    ]
    candidates.sort(key=lambda one: one[0])
    best: StepPlan | None = None
    for busiest_s, size, groups in candidates:
        # A step takes at least as long as its busiest group computes.
        if best is None or busiest_s < best.predicted_s:
            plan = complete(problem, _placed(problem, size, groups), began)
            best = plan if best is None or plan.predicted_s < best.predicted_s else best
    assert best is not None, "all ranks together are always a candidate"
    return best


def _sizes(problem: Problem) -> list[int]:
    """Divisors of the number of ranks that hold the longest sequence, ascending."""
    problem.require_fit()
    longest, ranks = int(problem.lengths.max(initial=0)), problem.num_ranks
    divisors = (size for size in range(1, ranks + 1) if ranks % size == 0)
    return [size for size in divisors if longest <= size * problem.capacity] or [ranks]


def _in_turn(problem: Problem, size: int) -> Groups:
    packs = list(_next_fit(problem.lengths.tolist(), size * problem.capacity))
    count = problem.num_ranks // size
    return [packs[group::count] for group in range(count)]


def _next_fit(tokens: list[int], room: int) -> Iterator[list[int]]:
    """Packs of at most `room` tokens in order of arrival; a longer sequence travels alone."""
    pack: list[int] = []
    held = 0
    for sequence, length in enumerate(tokens):
        if pack and held + length > room:
            yield pack
            pack, held = [], 0
        pack.append(sequence)
        held += length
    if pack:
        yield pack


def _longest_first(problem: Problem, size: int) -> Groups:
    order = np.argsort(-problem.lengths, kind="stable")
    room, tokens = size * problem.capacity, problem.lengths.tolist()
    too_long = int(np.count_nonzero(problem.lengths > room))
    packs = [[sequence] for sequence in order[:too_long].tolist()]
    packs += best_fit(tokens, room, order[too_long:].tolist())
    seconds = _pack_s(problem, size, packs, bool(_within_a_node(problem, size).all()))
    groups: Groups = [[] for _ in range(problem.num_ranks // size)]
    busy = [(0.0, group) for group in range(len(groups))]
    for pack in np.argsort(-seconds, kind="stable").tolist():
        busy_s, group = busy[0]
        groups[group].append(packs[pack])
        heapq.heapreplace(busy, (busy_s + float(seconds[pack]), group))
    return groups


def _busiest_s(problem: Problem, size: int, groups: Groups) -> float:
    """Seconds that the busiest group computes."""
    packs = [pack for group in groups for pack in group]
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    seconds = _pack_s(problem, size, packs, _within_a_node(problem, size)[owner])
    return float(np.bincount(owner, seconds, len(groups)).max())


def _pack_s(problem: Problem, size: int, packs: list[list[int]], within: ArrayLike) -> Seconds:
    """Seconds of each pack on `size` ranks that are `within` a node or not, [packs]."""
    counts = [len(pack) for pack in packs]
    owner = np.repeat(np.arange(len(packs)), counts)
    placed = np.fromiter((sequence for pack in packs for sequence in pack), np.int64, len(owner))
    tokens = problem.lengths[placed].astype(np.float64)
    held = np.bincount(owner, tokens, len(packs))
    squares = np.bincount(owner, tokens * tokens, len(packs))
    return problem.cost.seconds(squares, held, size, within)


def _within_a_node(problem: Problem, size: int) -> NDArray[np.bool_]:
    """Which groups of `size` consecutive ranks lie within one node, [groups]."""
    first = np.arange(0, problem.num_ranks, size)
    node = problem.cost.node_size
    within: NDArray[np.bool_] = first // node == (first + size - 1) // node
    return within


def _placed(problem: Problem, size: int, groups: Groups) -> list[Placed]:
    """Micro-batches in execution order, with offload where a sequence fits no other way."""
    rounds = max((len(packs) for packs in groups), default=0)
    return [
        Placed(
            range(group * size, (group + 1) * size),
            groups[group][index],
            _offload(problem, size, groups[group][index]),
        )
        for index in range(rounds)
        for group in range(len(groups))
        if index < len(groups[group])
    ]


def _offload(problem: Problem, size: int, pack: list[int]) -> float:
    held, room = int(problem.lengths[pack].sum()), size * problem.capacity
    return min(1.0, float(offload_to_fit(held, room, problem.stage_layers)))
