"""WLB-LLM's packing (OSDI 2025, arXiv 2503.17924) on rings of one size, written from the paper.

WLB-LLM also delays outliers to later steps, which changes the batches of a run. That is left out:
every sequence is placed in its step. A run names this planner as `module:function`. It runs at
least as many micro-batches as a pipeline has stages, if there are sequences for it.
"""

from __future__ import annotations

import heapq
import time
from typing import Any

from megascale.planner.peers.static import place_groups, static_sizes
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import complete
from megascale.planner.problem import Problem


def plan_wlb_llm(problem: Problem) -> StepPlan:
    """WLB-LLM's packing on the smallest rings that hold the longest sequence.

    Raises UserError where a sequence is too long for all ranks.
    """
    began = time.perf_counter()
    size = static_sizes(problem)[0]
    groups = problem.num_ranks // size
    room = max(size * problem.capacity, int(problem.lengths.max(initial=1)))
    each = max(-(-int(problem.lengths.sum()) // (groups * room)), 1)
    stages = min(problem.pipeline, -(-len(problem.lengths) // groups))
    each = max(each, stages)
    while (packs := _balanced_packs(problem, groups * each, room)) is None:
        each += 1
    seconds = [problem.cost.compute_s(problem.lengths[pack]).sum() for pack in packs]
    order = sorted(range(len(packs)), key=lambda one: -seconds[one])
    dealt: list[list[list[int]]] = [[] for _ in range(groups)]
    for turn in range(each):  # in turns back and forth, so that groups differ little
        row = order[turn * groups : (turn + 1) * groups]
        for group, one in enumerate(row if turn % 2 == 0 else reversed(row)):
            dealt[group].append(packs[one])
    return complete(problem, place_groups(problem, size, dealt), began)


def _balanced_packs(problem: Problem, number: int, room: int) -> list[list[int]] | None:
    """The longest sequence first, each to the pack of least work, or to the shortest pack if that
    has no room; None where a sequence fits in neither (WLB-LLM would delay it)."""
    lengths = problem.lengths.tolist()
    seconds = problem.cost.compute_s(problem.lengths).tolist()
    packs: list[list[int]] = [[] for _ in range(number)]
    work, tokens = [0.0] * number, [0] * number
    by_work = [(0.0, pack) for pack in range(number)]
    by_tokens = [(0, pack) for pack in range(number)]
    for sequence in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        pack = _least(by_work, work)
        if tokens[pack] + lengths[sequence] > room:
            pack = _least(by_tokens, tokens)
            if tokens[pack] + lengths[sequence] > room:
                return None
        packs[pack].append(sequence)
        work[pack] += seconds[sequence]
        tokens[pack] += lengths[sequence]
        heapq.heappush(by_work, (work[pack], pack))
        heapq.heappush(by_tokens, (tokens[pack], pack))
    return packs


def _least(heap: list[tuple[Any, int]], now: list[Any]) -> int:
    """The pack of the least value; entries of a heap that have changed since are dropped."""
    while heap[0][0] != now[heap[0][1]]:
        heapq.heappop(heap)
    return heap[0][1]
