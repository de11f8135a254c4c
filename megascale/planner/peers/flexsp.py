"""FlexSP's planner: micro-batches of like lengths, each split into groups by integer programming.

Source: FlexSP (arXiv 2412.01523): the sequence blaster, sequence bucketing, and the program of its
section on the formulation. What differs, and why, is said where it does.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.errors import UserError
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import Problem

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Cells = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Row, column and value of cells of a matrix."""

NUM_BUCKETS = 16
"""Buckets of one micro-batch (the paper's Q)."""
MOST_BUCKETS = 128
"""Buckets of a micro-batch that is so full that coarser ones would not fit."""
SOLVER_S = 10.0
"""Seconds for all programs of a step unless `Problem.budget_s` says; the paper takes 5 to 15."""
COUNTS_TRIED = 5
"""Numbers of micro-batches that are tried, from the fewest that can hold the tokens (M')."""

MOST_STUDIED = 8000
"""Variables up to which HiGHS may presolve a program and look for symmetry: these forget the time
limit (of 2 s, presolve took 29 s for 10,000; of 6 s, symmetry took 169 s for 190,000)."""


class Group(NamedTuple):
    """Ranks that share sequences, before it is known which ranks."""

    degree: int
    """Number of ranks, a power of two."""
    sequences: list[int]
    """Indices into the lengths of the micro-batch; of the step in a finished plan."""


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


@dataclass(frozen=True)
class Program:
    """The mixed-integer program of one micro-batch.

    Slots p of degree d_p stand for groups that may be used. Minimise the time C over the binary
    m_p (slot p is used) and the integer A_qp (sequences of bucket q in slot p), where
    time of slot p <= C, its tokens <= d_p * capacity * m_p, sum d_p m_p <= ranks, and
    sum over p of A_qp = sequences of bucket q.

    The bound on tokens stands for two rows of the paper, memory and "no sequences in an unused
    slot". Slots of a degree are used in order (m_p >= m_p+1), since they are alike. No more slots
    of a degree are offered than there are sequences. Degrees that do not divide a node count as
    across nodes unless there is only one.
    """

    lengths: Integers
    """Upper length of each bucket, ascending, [buckets]."""
    counts: Integers
    """Sequences of each bucket, [buckets]."""
    degrees: Integers
    """Ranks of each slot, descending, [slots]."""
    capacity: int
    """Most tokens per rank."""
    num_ranks: int
    """Most ranks of all slots in use."""
    overhead_s: Floats
    """Seconds of a slot in use, before any work, [slots]."""
    work_s: tuple[Floats, ...]
    """Seconds that one sequence of a bucket adds to a slot, [slots, buckets]; the slowest sum of
    them counts: compute and transfer, and if keys are passed on slower than attention computes,
    the passing in place of attention."""

    @staticmethod
    def of(problem: Problem, lengths: Integers, counts: Integers) -> Program:
        """The program for buckets of `counts` sequences taken as `lengths` tokens each."""
        cost, most = problem.cost, int(counts.sum())
        powers = [1 << power for power in range(problem.num_ranks.bit_length())]
        degrees = np.repeat(powers[::-1], [min(problem.num_ranks // d, most) for d in powers[::-1]])
        is_within = (cost.node_size % degrees == 0) | (problem.num_ranks <= cost.node_size)
        overhead_s = cost.seconds(0.0, 0.0, degrees, is_within)
        tokens = lengths.astype(np.float64)
        transfer = np.where(is_within, cost.transfer_intra, cost.transfer_inter) * (degrees > 1)
        passing = np.where(is_within, cost.pass_intra, cost.pass_inter) * (degrees - 1)
        shared = tokens * (cost.b + transfer[:, None])
        works = [(shared + cost.a * tokens * tokens) / degrees[:, None]]
        if passing.any():
            works.append((shared + passing[:, None] * tokens) / degrees[:, None])
        return Program(
            lengths,
            counts,
            degrees,
            problem.capacity,
            problem.num_ranks,
            overhead_s,
            tuple(works),
        )

    def solve(self, start: Sequence[Group] | None, limit_s: float) -> list[Group] | None:
        """The best groups found from `start` on within `limit_s` seconds, by HiGHS.

        Groups hold positions in the list of all sequences, ascending, and `start` does so too.
        None where nothing was found.
        """
        import highspy

        slot, bucket = np.nonzero(self.lengths <= self.capacity * self.degrees[:, None])
        library: Any = highspy  # partly without types
        solver = library.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("time_limit", limit_s)
        if len(slot) > MOST_STUDIED:
            solver.setOptionValue("presolve", "off")
            solver.setOptionValue("mip_detect_symmetry", False)
        solver.passModel(self._model(slot, bucket))
        if start is not None:
            solution = library.HighsSolution()
            solution.col_value = self._columns(self._taken(start), slot, bucket)
            solver.setSolution(solution)
        solver.run()
        status = solver.getInfo().primal_solution_status
        if status != library.SolutionStatus.kSolutionStatusFeasible:
            return None
        values = np.array(solver.getSolution().col_value)[1 + len(self.degrees) :]
        held = np.zeros((len(self.degrees), len(self.lengths)), dtype=np.int64)
        held[slot, bucket] = np.rint(values)
        return self._groups(held)

    def _model(self, slot: Integers, bucket: Integers) -> Any:
        """The program for HiGHS: columns are C, m_p, and A_qp for the given pairs of p and q."""
        import highspy

        rows = self._rows(slot, bucket)
        num_integers = len(self.degrees) + len(slot)
        model, kinds = highspy.HighsLp(), highspy.HighsVarType
        model.num_col_, model.num_row_ = 1 + num_integers, len(rows.lower)
        model.col_cost_ = np.eye(1, model.num_col_)[0]
        model.col_lower_ = np.zeros(model.num_col_)
        model.col_upper_ = np.concatenate([[np.inf], self.degrees > 0, self.counts[bucket]])
        model.row_lower_, model.row_upper_ = np.array(rows.lower), np.array(rows.upper)
        model.integrality_ = [kinds.kContinuous] + [kinds.kInteger] * num_integers
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = rows.sparse()
        return model

    def _rows(self, slot: Integers, bucket: Integers) -> _Rows:
        """The constraints."""
        slots = np.arange(len(self.degrees))
        used, held = 1 + slots, 1 + len(slots) + np.arange(len(slot))
        rows = _Rows()
        for work_s in self.work_s:
            time_is = (slots, 0 * slots, np.ones(len(slots)))
            overhead = (slots, used, -self.overhead_s / self._unit_s)
            work = (slot, held, -work_s[slot, bucket] / self._unit_s)
            rows.add(len(slots), 0.0, np.inf, time_is, overhead, work)
        room = (slots, used, self.degrees * float(self.capacity))
        rows.add(len(slots), 0.0, np.inf, room, (slot, held, -1.0 * self.lengths[bucket]))
        alike = np.flatnonzero(np.diff(self.degrees) == 0)
        row = np.arange(len(alike))
        one = np.ones(len(alike))
        rows.add(len(alike), 0.0, np.inf, (row, used[alike], one), (row, used[alike] + 1, -one))
        rows.add(1, 0.0, float(self.num_ranks), (0 * slots, used, 1.0 * self.degrees))
        for number, count in enumerate(self.counts.tolist()):
            members = held[bucket == number]
            rows.add(1, count, count, (0 * members, members, np.ones(len(members))))
        return rows

    @property
    def _unit_s(self) -> float:
        """Seconds of a unit of C: about the best time there can be, for the solver's tolerances."""
        return float(self.overhead_s[0] + self.counts @ self.work_s[0][0]) or 1.0

    def _columns(self, taken: Integers, slot: Integers, bucket: Integers) -> list[float]:
        """The solution for HiGHS with `taken` sequences of each bucket in each slot."""
        used: NDArray[np.bool_] = taken.sum(axis=1) > 0
        slowest_s = max(
            float(((taken * work_s).sum(axis=1) + self.overhead_s * used).max())
            for work_s in self.work_s
        )
        return [slowest_s / self._unit_s, *map(float, used), *map(float, taken[slot, bucket])]

    def _taken(self, groups: Sequence[Group]) -> Integers:
        """Sequences of each bucket in each slot, [slots, buckets]; the inverse of `_groups`."""
        of_sequence = np.repeat(np.arange(len(self.counts)), self.counts)
        taken = np.zeros((len(self.degrees), len(self.counts)), dtype=np.int64)
        used = np.zeros(len(self.degrees), dtype=np.int64)
        for group in groups:
            first = int(np.searchsorted(-self.degrees, -group.degree))
            np.add.at(taken[first + used[first]], of_sequence[group.sequences], 1)
            used[first] += 1
        return taken

    def _groups(self, taken: Integers) -> list[Group]:
        """Slots in use, with sequences of each bucket dealt in order: to the program all alike."""
        groups: list[list[int]] = [[] for _ in self.degrees]
        sequence = 0
        for slot, bucket in zip(*np.nonzero(taken.T)[::-1], strict=True):
            count = int(taken[slot, bucket])
            groups[slot] += range(sequence, sequence + count)
            sequence += count
        degrees = self.degrees.tolist()
        return [Group(d, held) for d, held in zip(degrees, groups, strict=True) if held]


class _Rows:
    """Rows of a sparse matrix with their bounds, added in blocks."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self._cells: list[Cells] = []

    def add(self, count: int, lower: float, upper: float, *cells: Cells) -> None:
        """Add `count` rows with the same bounds; `cells` count rows from the first of them."""
        first = len(self.lower)
        self._cells += [(first + row, column, value) for row, column, value in cells]
        self.lower += [lower] * count
        self.upper += [upper] * count

    def sparse(self) -> tuple[Integers, Integers, Floats]:
        """Where each row begins, then the columns and the values of all rows."""
        row, column, value = (np.concatenate(part) for part in zip(*self._cells, strict=True))
        order = np.argsort(row, kind="stable")
        begins = np.searchsorted(row[order], np.arange(len(self.lower) + 1))
        return begins, column[order], value[order]
