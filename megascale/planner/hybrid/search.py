"""The default planner: rings of any size, chosen by time as well as by memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megascale.arrays import Integers
from megascale.planner.bound import alone_s, fewest_ranks, nested_sizes, sizes_within
from megascale.planner.hybrid.chunks import plan_chunked
from megascale.planner.hybrid.levels import (
    STRETCH,
    Batch,
    Level,
    even_levels,
    long_levels,
    needed_s,
)
from megascale.planner.hybrid.shelves import LONGEST, has_few_short, longest_s, shelve
from megascale.planner.hybrid.stacks import Stacks
from megascale.planner.hybrid.waves import Sheet, even_level
from megascale.planner.peers.bytescale import plan_bytescale
from megascale.planner.peers.longest_first import plan_longest_first
from megascale.planner.peers.static import plan_static_balanced, plan_static_best
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import Problem

TRIES = 10
"""Plans that are made, of which the best is taken, where no budget of seconds says."""
LEAST_TRIES = 3
"""Plans that are made whatever the budget. Where shelves may pay they are one in waves, one in
shelves and a static one, since each may be far slower than the others."""
FEW, FEW_TIMES_RANKS, LIMITS = 1024, 16384, 12
"""Up to so many sequences, if there are few for a rank or few ranks too, other planners' plans are
tried; up to a quarter of it, so many limits for how long a ring may last."""
MANY = 16384
"""Sequences above which hindsight over static plans takes longer than all the rest."""
STACKS = ((1.0, False), (1.0, True), (0.5, False))
"""Ways to stack rings: how long they may last, as part of an even share, and whether sizes within
a node are rounded up to powers of two, which nest."""
WAVES_PAY = 1.025
"""Time of the best stacks over what is reachable, above which free plans are tried in waves too."""
LONG_PAYS = 1.045
"""Time of even waves over the work there is, above which long sequences get their own waves."""
LONG_PAYS_MUCH = 1.5
"""The same, above which these have their turn before other numbers of even waves."""
NEAR = 1.003
"""How exactly the level of a free plan is found."""
GOOD_ENOUGH = 1.002
"""Time over that of perfectly even waves at which no better way to fill them is looked for."""


def plan_hybrid(problem: Problem) -> StepPlan:
    """Plan a step as near to the lower bound as its mode allows; slow ranks are given less.

    Free mode: rings stacked on the least busy ranks, the rest leveled with short sequences
    (`hybrid.stacks`). Aligned and lockstep mode: waves of equal length (`hybrid.waves`), or of
    rings of like length where a pipeline gets hardly a short sequence (`hybrid.shelves`).
    Several ring sizes and numbers of waves are tried, `TRIES` of them or as many as `budget_s`
    allows, and more where there are few sequences; the plan with the least predicted time is taken.
    """
    began = time.perf_counter()
    problem.require_fit()
    batch = Batch.of(problem)
    chunked = plan_chunked(problem, lambda waves: _few_tries(waves, batch), began)
    limit_s = chunked.predicted_s if chunked else math.inf
    best = _best(problem, batch, began, TRIES, limit_s)
    if chunked and (best is None or best.seconds >= limit_s):
        return chunked
    whole = _fastest(problem, best.placed() if best else [[]], began)
    return chunked if chunked and chunked.predicted_s <= whole.predicted_s else whole


def _best(
    problem: Problem, batch: Batch, began: float, tries: int, limit_s: float = math.inf
) -> Candidate | None:
    """The best of so many candidates, or of those of the budget; None without a sequence.

    Waves that cannot take less than `limit_s` are not tried.
    """
    best: Candidate | None = None
    for number, candidate in enumerate(_candidates(problem, batch, limit_s), start=1):
        if best is None or candidate.seconds < best.seconds:
            best = candidate
        spent_s = time.perf_counter() - began
        is_over = number >= LEAST_TRIES and spent_s > (problem.budget_s or 0.0)
        if number == tries if problem.budget_s is None else is_over:
            break
    for candidate in _of_few(problem, batch):
        if best is None or candidate.seconds < best.seconds:
            best = candidate
    return best


def _few_tries(problem: Problem, batch: Batch) -> list[list[Placed]]:
    """Micro-batches of the best of the first candidates, in one order of execution or several."""
    found = islice(_candidates(problem, batch), LEAST_TRIES)
    best = min(found, key=lambda one: one.seconds, default=None)
    return best.placed() if best else []


Way = tuple[float, Callable[[Sheet, list[int]], bool]]
"""How many times an even wave rings may last, and how the rest is filled in."""


@dataclass(frozen=True)
class Candidate:
    """A plan and what it is predicted to take."""

    seconds: float
    placed: Callable[[], list[list[Placed]]]
    """Its micro-batches, in one order of execution or several."""


def _candidates(problem: Problem, batch: Batch, limit_s: float = math.inf) -> Iterator[Candidate]:
    """Plans in the order in which they are worth trying; not those that cannot beat `limit_s`."""
    if not batch.order:
        return
    if problem.mode != "free":
        waves = _waves(problem, batch, limit_s)
        if problem.pipeline > 1 and has_few_short(problem):
            limit_s = longest_s(problem, batch)
            found = (shelve(problem, batch, limit_s * part) for part in LONGEST)
            shelved = (_shelved(problem, *one) for one in found if one is not None)
            yield from islice(waves, 1)
            yield from islice(shelved, 1)
            is_many = len(batch.order) > MANY
            yield _of_peer((plan_static_balanced if is_many else plan_static_best)(problem))
            yield from _in_turn(waves, shelved)
        else:
            yield from waves
        return
    level_s = _reachable_s(problem, batch.lengths)
    best_s = math.inf
    for part, nest in STACKS:
        candidate = _stacks(problem, batch, level_s * part, nest)
        best_s = min(best_s, candidate.seconds)
        yield candidate
    if best_s > WAVES_PAY * level_s:
        yield from _waves(problem, batch)


def _in_turn(*kinds: Iterator[Candidate]) -> Iterator[Candidate]:
    """One of each kind after the other, so that none waits for all of another."""
    waiting = list(kinds)
    while waiting:
        for kind in list(waiting):
            candidate = next(kind, None)
            if candidate is None:
                waiting.remove(kind)
            else:
                yield candidate


def _shelved(
    problem: Problem, seconds: float, placed: Callable[[], list[list[Placed]]]
) -> Candidate:
    if max(problem.slowdown, default=1.0) > 1:  # which shelves know nothing of
        return _of_peer(_fastest(problem, placed()))
    return Candidate(seconds, placed)


def _of_peer(plan: StepPlan) -> Candidate:
    rings = [ring for ring in plan.rings if ring.sequences]
    placed = [Placed(one.ranks, one.sequences, one.offload) for one in rings]
    return Candidate(plan.predicted_s, lambda: [placed])


def _of_few(problem: Problem, batch: Batch) -> Iterator[Candidate]:
    """Plans for so few sequences that nothing evens them out: each decides, and much is tried."""
    number, ranks = len(batch.order), problem.num_ranks
    if not 0 < number <= FEW or number > 4 * ranks and number * ranks > FEW_TIMES_RANKS:
        return
    for planner in (plan_static_best, plan_static_balanced, plan_bytescale):
        yield _of_peer(planner(problem))
    if problem.lengths.max() <= problem.capacity:
        yield _of_peer(plan_longest_first(problem))
    if number > min(FEW // 4, 2 * ranks):
        return
    low, _ = even_level(problem, batch.lengths, 1)
    high = max(longest_s(problem, batch), 4 * low, 1e-12)
    for limit_s in np.geomspace(max(low, high * 1e-3), high, LIMITS).tolist():
        for rounded in (True, False):
            found = shelve(problem, batch, limit_s, rounded)
            if found is not None:
                yield _of_peer(_fastest(problem, found[1]()))


def _fastest(problem: Problem, orders: list[list[Placed]], began: float | None = None) -> StepPlan:
    plans = (complete(problem, placed, began) for placed in orders)
    return min(plans, key=lambda plan: plan.predicted_s)


def _reachable_s(problem: Problem, lengths: Integers) -> float:
    """Seconds of the most even plan: about the least in which all ranks can do all rings that
    last no longer.

    Above what even work takes where large rings cost more than they save, since keys and values
    are passed on more slowly than attention needs them.
    """
    even_s, _ = even_level(problem, lengths, 1)
    fixed = problem.cost.fixed

    def needed_s(limit_s: float) -> float:
        sizes = sizes_within(problem, lengths, limit_s)
        seconds = alone_s(problem, lengths, sizes)
        work_s = float(((seconds - fixed) * sizes).sum())
        return max(float(seconds.max()), fixed + work_s / problem.effective_ranks)

    low, high = even_s, needed_s(even_s)
    if high <= low * NEAR:
        return low
    high = min(high, needed_s(math.inf))
    while high > low * NEAR:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if needed_s(middle) <= middle else (middle, high)
    return high


def _stacks(problem: Problem, batch: Batch, limit_s: float, nest: bool) -> Candidate:
    sizes = sizes_within(problem, batch.lengths, limit_s)
    if nest:
        sizes = nested_sizes(problem, sizes)
    everything = np.arange(len(sizes))
    rings, ring_sizes, singles = batch.split(everything, sizes, problem.capacity)
    stacks = Stacks(problem, batch.tokens)
    stacks.add_rings(rings, ring_sizes)
    stacks.level(stacks.fill_gaps(singles))
    return Candidate(stacks.seconds, lambda: [stacks.placed()])


def _waves(problem: Problem, batch: Batch, limit_s: float = math.inf) -> Iterator[Candidate]:
    """Plans in waves: the most promising numbers of waves and ways to fill them first.

    None that cannot take less than `limit_s`, the time of a plan with chunks. Where even waves
    spread long sequences over so many ranks that it costs much, or have no room for large rings
    beside each other, the longest get waves of their own, which may take half the time of all even
    waves.
    """
    even, long = even_levels(problem, batch, limit_s), list[Level]()
    first, rest = even[:1], even[1:]
    best_s, work_s = limit_s, needed_s(problem, batch)

    def tried(levels: list[Level], ways: tuple[Way, ...]) -> Iterator[Candidate]:
        nonlocal best_s
        for candidate in _by_ways(problem, batch, levels, ways, best_s):
            best_s = min(best_s, candidate.seconds)
            yield candidate

    yield from tried(first, WAYS[0])
    if best_s > LONG_PAYS_MUCH * work_s:
        long = long_levels(problem, batch)
        yield from _in_turn(tried(long, WAYS[0]), tried(rest, WAYS[0]))
    else:
        yield from tried(rest, WAYS[0])
        if best_s > LONG_PAYS * work_s:
            long = long_levels(problem, batch)
            yield from tried(long, WAYS[0])
    levels = [*first, *rest, *long]
    if long:
        levels.sort(key=lambda level: level.step_s(problem.pipeline))
    for ways in WAYS[1:]:
        yield from tried(levels, ways)
    if best_s == math.inf:
        yield _roomiest(problem, batch)


def _by_ways(
    problem: Problem, batch: Batch, levels: list[Level], ways: tuple[Way, ...], best_s: float
) -> Iterator[Candidate]:
    """Every level filled in all ways, unless it cannot be better than `best_s`.

    Levels for which memory is too tight are taken from the list.
    """
    for level in list(levels):
        for way in ways:
            if best_s <= level.step_s(problem.pipeline) * GOOD_ENOUGH:
                break
            candidate = _filled(problem, batch, level, way)
            if candidate is None:
                levels.remove(level)
                break
            best_s = min(best_s, candidate.seconds)
            yield candidate


def _roomiest(problem: Problem, batch: Batch) -> Candidate:
    """Rings as small as memory allows, in as few waves as give all a place, however long."""
    alone = alone_s(problem, batch.lengths, fewest_ranks(problem, batch.lengths))
    everything, number = np.arange(len(batch.order)), 1
    while True:
        level = Level([], number, float(alone.sum()), everything, 0.0)
        candidate = _filled(problem, batch, level, WAYS[0][0])
        if candidate is not None:
            return candidate
        number *= 2  # with a wave for each sequence there is room


def _filled(problem: Problem, batch: Batch, level: Level, way: Way) -> Candidate | None:
    """A plan with rings of at most the level times a stretch; None where memory is too tight."""
    stretch, fill = way
    limit_s = level.seconds * stretch
    sizes = sizes_within(problem, batch.lengths[level.rest], limit_s)
    if level.shared:
        sizes = np.ones_like(sizes)
    for own in (sizes, nested_sizes(problem, sizes)):
        rings, ring_sizes, singles = batch.split(level.rest, own, problem.capacity)
        if level.shared:
            rings, ring_sizes, singles = [], [], batch.at(level.rest)
        sheet = _with_rings(problem, batch, level, limit_s, rings, ring_sizes)
        if sheet is not None:
            sheet.open_rest(max(1, level.shared))
            if fill(sheet, singles):
                waves = sheet.waves()
                return Candidate(waves.step_s, waves.placed)
    return None


def _with_rings(
    problem: Problem,
    batch: Batch,
    level: Level,
    limit_s: float,
    rings: list[int],
    sizes: list[int],
) -> Sheet | None:
    """The waves of a level with nothing but rings; None where these find no room."""
    target_s = [wave.seconds for wave in level.long] + [limit_s] * level.num_waves
    sheet = Sheet(problem, batch.tokens, target_s)
    for number, wave in enumerate(level.long):
        if not sheet.add_rings(batch.at(wave.members), wave.sizes.tolist(), number):
            return None
    return sheet if sheet.add_rings(rings, sizes) else None


def _by_level(sheet: Sheet, singles: list[int]) -> bool:
    return sheet.level(singles)


def _by_best_fit(sheet: Sheet, singles: list[int]) -> bool:
    return sheet.level(sheet.best_fit(singles))


WAYS: tuple[tuple[Way, ...], ...] = (
    ((STRETCH, _by_level), (STRETCH, _by_best_fit)),
    ((1.005, _by_best_fit), (1.02, _by_level), (1.02, _by_best_fit), (1.0, _by_level)),
    ((1.04, _by_level), (1.015, _by_best_fit), (1.0, _by_best_fit)),
)
"""Ways to fill waves, the most promising first; all numbers of waves have their turn with each."""
