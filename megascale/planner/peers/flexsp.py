"""FlexSP's planner: micro-batches of like lengths, each split into groups by integer programming.

Source: FlexSP (arXiv 2412.01523): the sequence blaster and sequence bucketing. The program is in
`flexsp_program`. What differs, and why, is said where it does.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.errors import UserError
from megascale.planner.peers.flexsp_program import Group, Program
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import Problem

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NUM_BUCKETS = 16
"""Buckets of one micro-batch (the paper's Q)."""
MOST_BUCKETS = 128
"""Buckets of a micro-batch that is so full that coarser ones would not fit."""
SOLVER_S = 10.0
"""Seconds for all programs of a step unless `Problem.budget_s` says; the paper takes 5 to 15."""
COUNTS_TRIED = 5
"""Numbers of micro-batches that are tried, from the fewest that can hold the tokens (M')."""


def plan_flexsp(problem: Problem) -> StepPlan:
    """Plan a step as FlexSP does: one wave of groups of 2^k ranks for every micro-batch.

    For each of five numbers of micro-batches the ascending list of lengths is cut
    (`blaster_ends`) and each part is solved (`solve_micro_batch`); the number with the least sum
    of times is taken. Where no number fits, more are tried. Groups are consecutive ranks, larger
    groups first, so they are aligned and a rank belongs to at most log2 N different ones.

    Different from the paper: the cost model is `problem.cost`, whose transfer terms stand for the
    paper's all-to-all; the programs, which the paper solves in parallel, are solved one after
    another; `budget_s` is split over them, and once it is spent the homogeneous plans stand.
    Different from the released code: degree 1 is allowed, and ranks may idle, as in the paper.
    Nothing is offloaded. Plans differ from run to run, since the solver is stopped by the clock.

    Raises UserError for a sequence that the largest power of two of the ranks cannot hold.
    """
    began = time.perf_counter()
    _require_fit(problem)
    if not len(problem.lengths):
        return complete(problem, [], began)
    order = np.argsort(problem.lengths, kind="stable")
    ascending = problem.lengths[order]
    budget_s = SOLVER_S if problem.budget_s is None else problem.budget_s
    best: list[list[Group]] | None = None
    for counts in _counts(problem):
        best = _best_of(problem, ascending, counts, began + budget_s)
        if best is not None:
            break
    assert best is not None, "a sequence to a micro-batch always fits"
    placed = [one for wave in best for one in _place(wave, order.tolist())]
    return complete(problem, placed, began)


def largest_degree(num_ranks: int) -> int:
    """Largest power of two of at most `num_ranks`."""
    return 1 << (num_ranks.bit_length() - 1)


def _require_fit(problem: Problem) -> None:
    problem.require_fit()
    longest, degree = int(problem.lengths.max(initial=0)), largest_degree(problem.num_ranks)
    if longest > degree * problem.capacity:
        raise UserError(
            f"a sequence of {longest} tokens does not fit {degree} ranks of {problem.capacity} "
            f"tokens, the most of {problem.num_ranks} ranks that planner.name = flexsp can share "
            f"it over (a power of two, no offload): set data.context_tokens="
            f"{degree * problem.capacity} or below, planner.capacity_tokens="
            f"{-(-longest // degree)} or planner.name=hybrid"
        )


def _counts(problem: Problem) -> Iterator[range]:
    """Numbers of micro-batches to try: M_min and the next four, then ever more until one fits."""
    num_sequences = len(problem.lengths)
    room = problem.num_ranks * problem.capacity
    begin = min(num_sequences, -(-int(problem.lengths.sum()) // room))
    while True:
        end = min(num_sequences + 1, begin + COUNTS_TRIED)
        yield range(begin, end)
        begin = min(num_sequences, max(end, begin * 5 // 4))


def _best_of(
    problem: Problem, ascending: Integers, counts: Sequence[int], deadline: float
) -> list[list[Group]] | None:
    """Groups of each micro-batch for the best of `counts`; None where none of them fits."""
    room = problem.num_ranks * problem.capacity
    tokens = np.concatenate([[0], np.cumsum(ascending)])
    cuts = [np.concatenate([[0], ends]) for ends in blaster_ends(ascending, counts)]
    cuts = [cut for cut in cuts if np.diff(tokens[cut]).max() <= room]
    unsolved = sum(len(cut) - 1 for cut in cuts)
    best: tuple[float, list[list[Group]]] | None = None
    for cut in cuts:
        total_s, waves = 0.0, []
        for begin, end in zip(cut[:-1].tolist(), cut[1:].tolist(), strict=True):
            limit_s = (deadline - time.perf_counter()) / unsolved
            unsolved -= 1
            groups = solve_micro_batch(problem, ascending[begin:end], limit_s)
            if groups is None:
                break
            total_s += wave_s(problem, ascending[begin:end], groups)
            waves.append([Group(g.degree, [begin + i for i in g.sequences]) for g in groups])
        else:
            if best is None or total_s < best[0]:
                best = total_s, waves
    return best[1] if best else None


def _place(groups: Sequence[Group], order: list[int]) -> Iterator[Placed]:
    """Consecutive ranks for the groups of a micro-batch, larger ones first."""
    first = 0
    for group in sorted(groups, key=lambda group: -group.degree):
        ranks = range(first, first + group.degree)
        yield Placed(ranks, [order[i] for i in group.sequences])
        first += group.degree


def blaster_ends(ascending: ArrayLike, counts: Sequence[int]) -> list[Integers]:
    """The sequence blaster: where to cut a list into so many consecutive, non-empty parts.

    For each of `counts`, the ends of the parts whose largest sum is least, [count]:
    DP[k][i] = min over j of max(DP[j][i-1], sum of the lengths j+1..k). The first of the two
    grows with j and the other falls, so a binary search finds where they cross.
    """
    sums = np.concatenate([[0], np.cumsum(np.asarray(ascending, dtype=np.int64))])
    num = len(sums) - 1
    largest, cuts = sums.copy(), [np.zeros(num + 1, dtype=np.int64)]
    for part in range(2, max(counts) + 1):
        ends = np.arange(part, num + 1)
        crossing = np.searchsorted((largest + sums)[part - 1 :], sums[ends]) + part - 1
        after = np.clip(crossing, part - 1, ends - 1)
        before = np.maximum(crossing - 1, part - 1)
        after_is, before_is = (
            np.maximum(largest[j], sums[ends] - sums[j]) for j in (after, before)
        )
        largest = np.concatenate([largest[:part], np.minimum(after_is, before_is)])
        cut = np.where(before_is <= after_is, before, after)
        cuts.append(np.concatenate([np.zeros(part, dtype=np.int64), cut]))
    return [_trace(cuts[:count], num) for count in counts]


def _trace(cuts: Sequence[Integers], end: int) -> Integers:
    """Ends of the parts, of which the last ends at `end`, given where each part begins."""
    ends = []
    for cut in reversed(cuts):
        if end:
            ends.append(end)
            end = int(cut[end])
    return np.array(ends[::-1], dtype=np.int64)


def bucket_ends(
    ascending: ArrayLike, num_buckets: int = NUM_BUCKETS, most_error: float = np.inf
) -> Integers:
    """Sequence bucketing: where to cut a list so that taking all lengths as the upper costs least.

    Ends of the buckets, at most `num_buckets` of them, which minimise the sum over all lengths of
    what the last length of the bucket exceeds them by:
    err[k][q] = min over j of err[j][q-1] + sum over i in j+1..k of (s_k - s_i).
    While the error is above `most_error`, buckets are added, up to MOST_BUCKETS.
    """
    lengths, counts = np.unique(np.asarray(ascending, dtype=np.int64), return_counts=True)
    number = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(counts * lengths)])
    upper = np.concatenate([[0], lengths])
    error, cuts = number * upper - tokens, [np.zeros(len(upper), dtype=np.int64)]
    while error[-1] > 0 and len(cuts) < (MOST_BUCKETS if error[-1] > most_error else num_buckets):
        error, cut = _bucket_layer(upper, number, tokens, error)
        cuts.append(cut)
    ends: Integers = number[_trace(cuts, len(lengths))]
    return ends


def _bucket_layer(
    upper: Integers, number: Integers, tokens: Integers, before: Integers
) -> tuple[Integers, Integers]:
    """Least error with one bucket more than in `before`, and where that bucket begins.

    The best begin never falls as the end grows. So ends are solved coarse to fine, each between
    the begins of its neighbours, all those of one stride at once.
    """
    last = len(upper) - 1
    error, cut = np.zeros_like(before), np.zeros_like(before)
    stride = largest_degree(last)
    while stride:
        ends = np.arange(stride, last + 1, 2 * stride)
        low, after = cut[ends - stride], np.minimum(ends + stride, last)
        high = np.where(ends + stride <= last, np.minimum(cut[after], ends - 1), ends - 1)
        sizes = high - low + 1
        starts = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(len(ends)), sizes)
        begin, end = np.arange(len(owner)) - (starts - low)[owner], ends[owner]
        value = before[begin] + (number[end] - number[begin]) * upper[end]
        value -= tokens[end] - tokens[begin]
        error[ends] = np.minimum.reduceat(value, starts)
        is_least = np.flatnonzero(value == error[end])[::-1]
        cut[end[is_least]] = begin[is_least]
        stride //= 2
    return error, cut


def wave_s(problem: Problem, lengths: Integers, groups: Sequence[Group]) -> float:
    """Seconds of the slowest of `groups`, placed on consecutive ranks, larger ones first."""
    groups = sorted(groups, key=lambda group: -group.degree)
    degrees = np.array([group.degree for group in groups], dtype=np.int64)
    sizes = [len(group.sequences) for group in groups]
    held = lengths[[i for group in groups for i in group.sequences]].astype(np.float64)
    owner = np.repeat(np.arange(len(groups)), sizes)
    first, node = np.cumsum(degrees) - degrees, problem.cost.node_size
    seconds = problem.cost.seconds(
        np.bincount(owner, held * held, len(groups)),
        np.bincount(owner, held, len(groups)),
        degrees,
        first // node == (first + degrees - 1) // node,
    )
    return float(seconds.max())


def best_homogeneous(problem: Problem, lengths: Integers) -> list[Group] | None:
    """The fastest micro-batch with groups of one degree (FlexSP's warm start); None if none fits.

    Sequences go to the group with the least work that has room, longest first.
    """
    best: tuple[float, list[Group]] | None = None
    for power in range(problem.num_ranks.bit_length()):
        groups = _deal(problem, lengths, 1 << power)
        if groups is not None:
            seconds = wave_s(problem, lengths, groups)
            if best is None or seconds < best[0]:
                best = seconds, groups
    return best[1] if best else None


def _deal(problem: Problem, lengths: Integers, degree: int) -> list[Group] | None:
    room = degree * problem.capacity
    count = min(problem.num_ranks // degree, len(lengths))
    if int(lengths.max()) > room or int(lengths.sum()) > room * count:
        return None
    groups = [Group(degree, []) for _ in range(count)]
    seconds, tokens = problem.cost.compute_s(lengths).tolist(), lengths.tolist()
    lightest = [(0.0, 0, group) for group in range(count)]
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        full = []
        while lightest and lightest[0][1] + tokens[sequence] > room:
            full.append(heapq.heappop(lightest))
        if not lightest:
            return None
        work_s, held, group = lightest[0]
        groups[group].sequences.append(sequence)
        entry = (work_s + seconds[sequence], held + tokens[sequence], group)
        heapq.heapreplace(lightest, entry)
        for one in full:
            heapq.heappush(lightest, one)
    return groups


def solve_micro_batch(
    problem: Problem, ascending: Integers, limit_s: float = np.inf
) -> list[Group] | None:
    """Groups for the sequences of one micro-batch, ascending; never slower than homogeneous ones.

    The program is solved for the upper lengths of 16 buckets, more where the micro-batch is so
    full that these would not fit it (the released code's rule: the error may take half of what is
    free). What it decides is timed with the real lengths. Without any time (`limit_s` in seconds),
    or where the solver finds nothing faster, the best homogeneous groups stand; None where these
    do not fit either.
    """
    homogeneous = best_homogeneous(problem, ascending)
    if limit_s <= 0:
        return homogeneous
    free = problem.num_ranks * problem.capacity - int(ascending.sum())
    ends = bucket_ends(ascending, most_error=free / 2)
    program = Program.of(problem, ascending[ends - 1], np.diff(ends, prepend=0))
    start = best_homogeneous(problem, np.repeat(program.lengths, program.counts))
    found = program.solve(start, limit_s)
    fits = found and all(
        int(ascending[group.sequences].sum()) <= group.degree * problem.capacity for group in found
    )
    if not found or not fits:
        return homogeneous
    candidates = [found] if homogeneous is None else [found, homogeneous]
    return min(candidates, key=lambda groups: wave_s(problem, ascending, groups))
