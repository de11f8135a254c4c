"""Static context parallelism with packing: one ring size for all, as Megatron users run it.

The ranks form groups of one size. As in Megatron-LM, whose schedule has one number of
micro-batches for all data-parallel groups, every group runs the same number of packs
(micro-batches) in a step, and packs are evenly filled. The number of packs of a group, called
rounds here, is the smallest with which all sequences fit. With pipeline stages it is the number of
stages where that is larger and promises a shorter step.

Packs without a sequence exist only where a batch has fewer sequences than packs. Then a pack has
one sequence at most, and the groups differ by one pack at most. `complete` adds an empty
micro-batch for a rank that has none at all, and in lockstep mode for the ranks with one pack less.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.planner.cost import FORWARD_SHARE
from megascale.planner.peers.ring_sizes import offload_to_fit
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import Problem

Seconds = NDArray[np.float64]
Groups = list[list[list[int]]]
"""Sequences of each pack of each group of ranks, in execution order."""
Packing = Callable[[Problem, int, int], Groups | None]
"""From a problem, the size of a group and the rounds to packs; None where they do not fit."""

ROUNDS_TRIED = 2
"""Numbers of rounds that hindsight tries beside the smallest, for pipelines."""


def plan_static(problem: Problem) -> StepPlan:
    """The baseline of ByteScale and FlexSP: one ring size, packs in order of arrival.

    The ring size is the smallest divisor of the number of ranks that holds the longest sequence;
    groups are consecutive ranks. The batch is cut in order of arrival into packs of nearly the same
    number of tokens, and a group takes consecutive packs. Raises UserError where a sequence is too
    long for all ranks. A sequence that fits only with offload gets as much offload as it needs.
    """
    return plan_static_rings(problem, static_sizes(problem)[0])


def plan_static_rings(problem: Problem, size: int) -> StepPlan:
    """`plan_static` with rings of `size` ranks, which must divide the ranks of the problem.

    The longest sequence must fit a ring, unless the ring has all ranks.
    """
    began = time.perf_counter()
    groups = _packed(problem, size, _in_order, _usual_rounds(problem, size))
    return complete(problem, place_groups(problem, size, groups), began)


def plan_static_balanced(problem: Problem) -> StepPlan:
    """`plan_static` with packs of even time: longest sequence first, to the least busy.

    In lockstep mode all packs of the step are evened out, since a round is as slow as its slowest
    pack. In the other modes groups do not wait for each other before the step ends, so first the
    groups are evened out, then the packs of each.
    """
    began = time.perf_counter()
    size = static_sizes(problem)[0]
    packing = _even_packs if problem.mode == "lockstep" else _even_groups
    groups = _packed(problem, size, packing, _usual_rounds(problem, size))
    return complete(problem, place_groups(problem, size, groups), began)


def plan_static_best(problem: Problem) -> StepPlan:
    """The best static plan with hindsight: of every ring size that fits, and of all packings.

    With pipeline stages also several numbers of rounds are tried. No user knows the result before
    the step; a planner that beats it owes nothing to a bad choice of the static ring size.
    """
    began = time.perf_counter()
    best: StepPlan | None = None
    for promised_s, size, rounds in _most_promising(problem):
        if best is not None and promised_s >= best.predicted_s:
            break
        packings = _all_packings(problem, size, rounds)
        busiest_s = [_busiest_s(problem, size, groups) for groups in packings]
        for position in np.argsort(busiest_s, kind="stable").tolist():
            if best is None or busiest_s[position] < best.predicted_s:
                plan = complete(problem, place_groups(problem, size, packings[position]), began)
                best = plan if best is None or plan.predicted_s < best.predicted_s else best
    assert best is not None, "all ranks together are always a candidate"
    return best


def _most_promising(problem: Problem) -> list[tuple[float, int, int]]:
    """What hindsight compares: (seconds if packs were even, size, rounds), the fastest first."""
    return sorted(
        (_promised_s(problem, size, rounds), size, rounds)
        for size in static_sizes(problem)
        for rounds in _rounds_to_try(problem, size)
    )


def static_sizes(problem: Problem) -> list[int]:
    """Ring sizes for one step: divisors of the ranks that hold the longest sequence, ascending.

    All ranks where it fits with offload only. Raises UserError where it does not fit at all.
    """
    problem.require_fit()
    longest, ranks = int(problem.lengths.max(initial=0)), problem.num_ranks
    divisors = (size for size in range(1, ranks + 1) if ranks % size == 0)
    return [size for size in divisors if longest <= size * problem.capacity] or [ranks]


def _all_packings(problem: Problem, size: int, rounds: int) -> list[Groups]:
    """What `plan_static_best` compares for one ring size and number of rounds.

    Only in lockstep mode is it of use to even out the packs of a round.
    """
    packings: list[Packing] = [_even_groups, _in_order]
    packings += [_even_packs] * (problem.mode == "lockstep")
    return [_packed(problem, size, packing, rounds) for packing in packings]


def _packed(problem: Problem, size: int, packing: Packing, rounds: int) -> Groups:
    """Packs in `rounds` rounds, or in more where the packing finds no place for a sequence."""
    while True:
        groups = packing(problem, size, rounds)
        if groups is not None:
            return groups
        rounds += 1 + rounds // 16


def _fewest_rounds(problem: Problem, size: int) -> int:
    """Rounds without which the tokens, or the sequences above half a pack, cannot fit."""
    groups, room = problem.num_ranks // size, size * problem.capacity
    by_tokens = -(-int(np.minimum(problem.lengths, room).sum()) // (groups * room))
    by_halves = -(-int(np.count_nonzero(2 * problem.lengths > room)) // groups)
    return max(1, by_tokens, by_halves)


def _usual_rounds(problem: Problem, size: int) -> int:
    """The fewest rounds, or as many as a pipeline has stages where that promises to be faster."""
    fewest = _fewest_rounds(problem, size)
    per_group = len(problem.lengths) * size // problem.num_ranks
    one_a_stage = max(fewest, min(problem.pipeline, per_group))
    return min((fewest, one_a_stage), key=partial(_promised_s, problem, size))


def _rounds_to_try(problem: Problem, size: int) -> list[int]:
    """The fewest rounds, and for a pipeline the usual ones and those that promise most.

    Packs of j sequences of like length need as many rounds as j goes into the sequences of a group.
    """
    fewest = _fewest_rounds(problem, size)
    if problem.pipeline == 1:
        return [fewest]
    most = max(1, -(-len(problem.lengths) * size // problem.num_ranks))
    per_pack = np.unique(np.geomspace(1, most, 24).astype(np.int64))
    options = {rounds for rounds in (-(-most // per_pack)).tolist() if rounds > fewest}
    promising = sorted(options, key=partial(_promised_s, problem, size))[:ROUNDS_TRIED]
    return sorted({fewest, _usual_rounds(problem, size), *promising})


def _promised_s(problem: Problem, size: int, rounds: int) -> float:
    """Seconds of `rounds` rounds of even packs.

    P pipeline stages take (rounds + P - 1) times what a pack takes.
    """
    start_s = float(problem.cost.seconds(0.0, 0.0, size, True))
    work_s = _least_s(problem, size) - start_s
    return (rounds + problem.pipeline - 1) * (start_s + work_s / rounds)


def _least_s(problem: Problem, size: int) -> float:
    """Seconds that no plan with rings of `size` can beat: all work in one even pack a group."""
    tokens, one_node = problem.lengths.astype(np.float64), np.array([True, False])
    start_s = problem.cost.seconds(0.0, 0.0, size, one_node)
    work_s = problem.cost.seconds((tokens * tokens).sum(), tokens.sum(), size, one_node) - start_s
    return float((start_s + work_s / (problem.num_ranks // size)).min())


def _in_order(problem: Problem, size: int, rounds: int) -> Groups | None:
    """The batch cut in order of arrival; each group takes consecutive packs."""
    num_packs, room = problem.num_ranks // size * rounds, size * problem.capacity
    ends = _even_cuts(np.minimum(problem.lengths, room).tolist(), num_packs, room)
    if ends is None:
        return None
    packs = [list(range(*cut)) for cut in zip([0, *ends[:-1]], ends, strict=True)]
    return [
        [pack for pack in packs[first : first + rounds] if pack]
        for first in range(0, num_packs, rounds)
    ]


def _even_cuts(tokens: list[int], num_packs: int, room: int) -> list[int] | None:
    """Where to cut a list into packs: the end of each, as near as can be to even tokens.

    No pack exceeds `room`, and none is empty. Fewer sequences than packs are spread evenly, one to
    a pack. None where so many packs cannot hold all.
    """
    num = len(tokens)
    if num <= num_packs:
        return [pack * num // num_packs for pack in range(1, num_packs + 1)]
    sums = [0, *np.cumsum(tokens).tolist()]
    earliest = [num]  # end of each pack, the last first, if all packs after it are full
    for _ in range(num_packs):
        earliest.append(bisect_left(sums, sums[earliest[-1]] - room))
    if earliest.pop() > 0:
        return None
    ends, begin = [], 0
    for packed, least in enumerate(reversed(earliest), start=1):
        at = bisect_left(sums, sums[-1] * packed / num_packs)
        at -= 2 * sums[-1] * packed <= num_packs * (sums[at - 1] + sums[at])
        full = bisect_right(sums, sums[begin] + room) - 1
        begin = min(max(at, least, begin + 1), full, num - (num_packs - packed))
        ends.append(begin)
    return ends


def _even_groups(problem: Problem, size: int, rounds: int) -> Groups | None:
    """Sequences to the least busy group, then those of each group to its least busy pack.

    Fewer sequences than packs are dealt one by one, as in `_even_packs`.
    """
    num_groups = problem.num_ranks // size
    if len(problem.lengths) < num_groups * rounds:
        return _even_packs(problem, size, rounds)
    room, work = size * problem.capacity, _Work.of(problem, size)
    shares = _deal(work, work.longest_first, num_groups, rounds * room, least=rounds)
    packed = [_deal(work, share, rounds, room) for share in shares or []]
    if shares is None or None in packed:
        return None
    return [sorted(packs, key=work.busy_s, reverse=True) for packs in packed if packs]


def _even_packs(problem: Problem, size: int, rounds: int) -> Groups | None:
    """Sequences to the least busy pack of all; packs of like time are in the same round."""
    num_groups, work = problem.num_ranks // size, _Work.of(problem, size)
    packs = _deal(work, work.longest_first, num_groups * rounds, size * problem.capacity)
    if packs is None:
        return None
    packs = sorted(filter(None, packs), key=work.busy_s, reverse=True)
    groups: Groups = [[] for _ in range(num_groups)]
    busy_s = [0.0] * num_groups
    for first in range(0, len(packs), num_groups):
        least_busy = sorted(range(num_groups), key=busy_s.__getitem__)
        for group, pack in zip(least_busy, packs[first : first + num_groups], strict=False):
            groups[group].append(pack)
            busy_s[group] += work.busy_s(pack)
    return groups


class _Work(NamedTuple):
    """What sequences ask of a ring, in seconds times its ranks, without what starting it takes."""

    tokens: list[int]
    """Tokens of each sequence."""
    attention_s: list[float]
    """Attention of each sequence."""
    token_s: float
    """Everything else, for a token."""
    passing_s: float
    """Passing keys and values on, for a token; hidden behind the attention of its pack."""
    longest_first: list[int]

    @staticmethod
    def of(problem: Problem, size: int) -> _Work:
        cost, lengths = problem.cost, problem.lengths
        within, shared = bool(_within_a_node(problem, size).all()), size > 1
        transfer = cost.transfer_intra if within else cost.transfer_inter
        passing = cost.pass_intra if within else cost.pass_inter
        return _Work(
            lengths.tolist(),
            (cost.a * lengths.astype(np.float64) ** 2).tolist(),
            cost.b + transfer * shared,
            passing * (size - 1),
            np.argsort(-lengths, kind="stable").tolist(),
        )

    def time_s(self, attention_s: float, tokens: int) -> float:
        """Seconds of a pack of so much attention and so many tokens."""
        passing_s = self.passing_s * tokens
        return self.token_s * tokens + (attention_s if attention_s > passing_s else passing_s)

    def busy_s(self, sequences: list[int]) -> float:
        """Seconds of a pack."""
        attention_s = sum(self.attention_s[sequence] for sequence in sequences)
        return self.time_s(attention_s, sum(self.tokens[sequence] for sequence in sequences))


def _deal(
    work: _Work, sequences: list[int], num_bins: int, room: int, least: int = 0
) -> list[list[int]] | None:
    """Each sequence, in the given order, to the least busy bin that has room for it.

    Every bin gets `least` sequences or more, if there are so many: the last ones go to the bins
    that lack some. A sequence that no room holds, since it needs offload, gets a bin of its own.
    None where a sequence finds no place.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    attention_s = [0.0] * num_bins
    heap = [(0.0, 0, number) for number in range(num_bins)]
    lacking = least * num_bins
    for left, sequence in zip(range(len(sequences), 0, -1), sequences, strict=True):
        skipped, tokens = [], work.tokens[sequence]
        while heap:
            busy_s, held, number = heapq.heappop(heap)
            is_open = left > lacking or len(bins[number]) < least
            if is_open and (held + tokens <= room or not held):
                break
            if is_open:  # a bin that is closed stays closed, since only lacking ones get more
                skipped.append((busy_s, held, number))
        else:
            return None
        lacking -= len(bins[number]) < least
        bins[number].append(sequence)
        attention_s[number] += work.attention_s[sequence]
        busy_s = work.time_s(attention_s[number], held + tokens)
        for entry in (*skipped, (busy_s, held + tokens, number)):
            heapq.heappush(heap, entry)
    return bins


def _busiest_s(problem: Problem, size: int, groups: Groups) -> float:
    """Seconds that the step takes at least, by the busiest group.

    Its last pipeline stage waits for the first forward of all stages before it, which wait for the
    last backward after it.
    """
    packs = [pack for group in groups for pack in group]
    counts = np.array([len(group) for group in groups], dtype=np.int64)
    owner = np.repeat(np.arange(len(groups)), counts)
    seconds = _pack_s(problem, size, packs, _within_a_node(problem, size)[owner])
    busy_s = np.bincount(owner, seconds, len(groups)).astype(np.float64)
    ends = np.cumsum(counts)[counts > 0]
    first, last = seconds[ends - counts[counts > 0]], seconds[ends - 1]
    fill_s = FORWARD_SHARE * first + (1 - FORWARD_SHARE) * last
    busy_s[counts > 0] += (problem.pipeline - 1) * fill_s
    return float(busy_s.max())


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


def place_groups(problem: Problem, size: int, groups: Groups) -> list[Placed]:
    """Micro-batches in execution order, of rings of `size` consecutive ranks.

    They have offload where a sequence fits no other way.
    """
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
    if held <= room:
        return 0.0
    return min(1.0, float(offload_to_fit(held, room, problem.stage_layers)))
