"""How small a ring may be, and how fast any plan can be."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from megascale.arrays import Integers, Seconds
from megascale.planner.cost import FORWARD_SHARE, CostModel
from megascale.planner.problem import Problem
from megascale.planner.ring import kept_share


def memory_sizes(problem: Problem, lengths: Integers, gain: float = 1.0) -> Integers:
    """Fewest ranks that hold each of `lengths`, of `gain` times the capacity each."""
    sizes: Integers = np.maximum(1, np.ceil(lengths / (problem.capacity * gain) - 1e-9))
    return sizes.astype(np.int64)


def fewest_ranks(problem: Problem, lengths: Integers) -> Integers:
    """Fewest ranks that hold each of `lengths`, with as much offload as its own forward hides.

    Where even all ranks could not hold a sequence so, it offloads all it can, hidden or not.
    """
    if problem.offload is None:
        return memory_sizes(problem, lengths)
    most = hidden_offload(problem, lengths)
    gains = 1.0 / (1.0 - most * (1.0 - 1.0 / problem.offload.gain(1.0)))
    sizes: Integers = np.ceil(lengths / (problem.capacity * gains) - 1e-9).astype(np.int64)
    return np.clip(sizes, 1, problem.num_ranks)


def hidden_offload(problem: Problem, lengths: Integers) -> Seconds:
    """Largest part of the activations whose copy to the host takes no longer than forward.

    Of each sequence; after ByteScale, Eq. 3. The size of the ring shortens both alike.
    """
    assert problem.offload is not None
    host, tokens = problem.offload, lengths.astype(np.float64)
    copied = tokens * host.bytes_per_token * max(1, host.stage_layers - 2)
    forward_s = FORWARD_SHARE * tokens * (problem.cost.a * tokens + problem.cost.b)
    return np.minimum(1.0, forward_s * host.copy_bytes_per_s / copied)


def needed_offload(problem: Problem, tokens: float, size: int) -> float:
    """Smallest offload with which `size` ranks hold `tokens`; 0 where they do without."""
    share = problem.capacity * size / tokens
    if share >= 1 or problem.stage_layers <= 2:
        return 0.0
    least = kept_share(1.0, problem.stage_layers)
    return min(1.0, (1.0 - share) / (1.0 - least))


def alone_s(problem: Problem, lengths: Integers, sizes: Integers) -> Seconds:
    """Seconds of each sequence alone on a ring of its size; within a node where it can be."""
    tokens = lengths.astype(np.float64)
    return problem.cost.seconds(tokens * tokens, tokens, sizes, sizes <= problem.cost.node_size)


def smallest_sizes(
    problem: Problem, lengths: Integers, fewest: Integers, limit_s: float
) -> Integers:
    """Smallest ring, of at least `fewest` ranks, on which each sequence takes at most `limit_s`.

    0 where no ring is fast enough.
    """
    return RingSizes(problem, lengths, fewest).smallest(limit_s)


class RingSizes:
    """Ring sizes of sequences, for several limits of time."""

    def __init__(self, problem: Problem, lengths: Integers, fewest: Integers) -> None:
        """Of sequences of `lengths` tokens, on rings of at least `fewest` ranks."""
        self._fewest = fewest
        self._fewest_s = alone_s(problem, lengths, fewest)
        node = min(problem.cost.node_size, problem.num_ranks)
        self._ranges = [
            _Range(problem, lengths, fewest, low, high)
            for low, high in ((2, node), (node + 1, problem.num_ranks))
            if low <= high
        ]

    def smallest(self, limit_s: float) -> Integers:
        """See `smallest_sizes`."""
        sizes = np.where(self._fewest_s <= limit_s, self._fewest, 0)
        for some in self._ranges:
            todo = np.flatnonzero((sizes == 0) & (some.fastest_s <= limit_s))
            if len(todo):
                sizes[todo] = some.smallest(todo, limit_s)
        return sizes


class _Range:
    """Rings of `low` to `high` ranks, all within a node or all across nodes."""

    def __init__(
        self, problem: Problem, lengths: Integers, fewest: Integers, low: int, high: int
    ) -> None:
        cost, tokens = problem.cost, lengths.astype(np.float64)
        within = high <= cost.node_size
        self._fixed, self._latency = cost.fixed, cost.latency
        self._passing = (cost.pass_intra if within else cost.pass_inter) * tokens
        self._attention = cost.a * tokens * tokens
        transfer = cost.transfer_intra if within else cost.transfer_inter
        self._work = self._attention + (cost.b + transfer) * tokens
        self._begin = np.maximum(fewest, low)
        self._end = np.minimum(high, np.maximum(self._begin, _fastest(problem, lengths, high)))
        everything = np.arange(len(lengths))
        self.fastest_s = np.where(self._begin <= high, self._seconds(everything, self._end), np.inf)
        """Seconds of each sequence on its fastest ring; infinite where no size is in the range."""

    def _seconds(self, some: Integers, sizes: Integers) -> Seconds:
        """`alone_s` of some sequences."""
        work = self._work[some]
        if self._passing.any():
            passing = self._passing[some] * (sizes - 1) - self._attention[some]
            work = work + np.maximum(0.0, passing)
        seconds: Seconds = self._fixed + self._latency * np.log2(sizes) + work / sizes
        return seconds

    def smallest(self, some: Integers, limit_s: float) -> Integers:
        """Bisection over the sizes up to the fastest one, where time falls with size."""
        low, top = self._begin[some], self._end[some]
        while np.any(low < top):
            middle = (low + top) // 2
            fast = self._seconds(some, middle) <= limit_s
            top = np.where(fast, middle, top)
            low = np.where(fast, low, np.minimum(middle + 1, top))
        return top


def _fastest(problem: Problem, lengths: Integers, high: int) -> Integers:
    """Ring size, up to `high`, beyond which a sequence gets slower.

    There latency grows faster than work shrinks; where attention no longer hides what is passed
    on, only the work beyond passing still shrinks.
    """
    cost, tokens = problem.cost, lengths.astype(np.float64)
    one_node = high <= cost.node_size
    transfer = cost.transfer_intra if one_node else cost.transfer_inter
    passing = cost.pass_intra if one_node else cost.pass_inter
    hidden = np.full(len(lengths), np.inf) if passing == 0 else cost.a * tokens / passing + 1
    work_s, beyond_s = (cost.b + transfer) * tokens, (cost.b + transfer - passing) * tokens
    per_rank = math.log(2) / cost.latency if cost.latency else np.inf
    shrinking = np.where(beyond_s > 0, np.maximum(beyond_s, 1e-300) * per_rank, 0.0)
    best = (work_s + cost.a * tokens * tokens + 1e-300) * per_rank
    best = np.minimum(best, np.maximum(hidden, shrinking))
    lower: Integers = np.clip(best, 1, high).astype(np.int64)
    upper = np.minimum(lower + 1, high)
    is_faster = alone_s(problem, lengths, upper) < alone_s(problem, lengths, lower)
    return np.where(is_faster, upper, lower)


def fastest_sizes(problem: Problem, lengths: Integers, fewest: Integers) -> Integers:
    """The ring, of at least `fewest` ranks, on which each sequence is fastest."""
    node = min(problem.cost.node_size, problem.num_ranks)
    within = np.maximum(fewest, _fastest(problem, lengths, node))
    across = np.maximum(fewest, _fastest(problem, lengths, problem.num_ranks))
    sizes = np.stack([fewest, within, across])  # one rank alone passes nothing on
    best = alone_s(problem, np.broadcast_to(lengths, sizes.shape), sizes).argmin(axis=0)
    chosen: Integers = np.take_along_axis(sizes, best[None], axis=0)[0]
    return chosen


def sizes_within(problem: Problem, lengths: Integers, limit_s: float) -> Integers:
    """The smallest ring on which each sequence takes at most `limit_s`, else the fastest."""
    fewest = fewest_ranks(problem, lengths)
    sizes = smallest_sizes(problem, lengths, fewest, limit_s)
    return np.where(sizes == 0, fastest_sizes(problem, lengths, fewest), sizes)


def nested_sizes(problem: Problem, sizes: Integers, whole_nodes: bool = False) -> Integers:
    """Sizes within a node rounded up to powers of two: these fill nodes without rest.

    `whole_nodes`: larger sizes are rounded up to whole nodes, else they stay.
    """
    node = min(problem.cost.node_size, problem.num_ranks)
    within = np.minimum(node, 2 ** np.ceil(np.log2(sizes))).astype(np.int64)
    return np.where(sizes <= node, within, -(-sizes // node) * node if whole_nodes else sizes)


def chunked_memory(problem: Problem) -> Problem:
    """`problem` with the tokens of one sequence that a rank holds as its capacity."""
    held = problem.capacity * (problem.pipeline if problem.may_chunk else 1)
    return replace(problem, capacity=held, chunks=1)


def lower_bound_s(problem: Problem) -> float:
    """Seconds that no plan can beat, by the cost model.

    The larger of two times, solved together: the longest sequence on the ring that is best for
    it, and the work of all sequences spread evenly, each on the smallest ring that memory and the
    bound itself allow (a smaller one would take longer than the whole step). Every rank runs at
    least one micro-batch, and no micro-batch holds more than its capacity.

    With P pipeline stages a sequence passes all of them, so it takes P times its time on one; and
    the last stage waits for P - 1 forwards before its work, and P - 1 backwards follow it. Where
    plans may cut sequences into chunks, several stages compute a sequence at a time, and a rank
    holds P times its capacity of one.
    """
    stages = 1 if problem.may_chunk else problem.pipeline
    fill_s = (problem.pipeline - 1) * problem.cost.fixed
    problem = chunked_memory(problem)
    lengths = np.unique(problem.lengths)
    if not len(lengths):
        return problem.cost.fixed + fill_s
    problem = replace(problem, cost=_cheapest_inside(problem.cost))
    gain = problem.offload.gain(1.0) if problem.offload else 1.0
    times = np.bincount(np.searchsorted(lengths, problem.lengths)).astype(np.float64)
    fewest = np.minimum(memory_sizes(problem, lengths, gain), problem.num_ranks)
    held = problem.capacity * gain
    low = _even_s(problem, lengths, times, fewest, held, np.inf) + fill_s
    longest_s = stages * float(alone_s(problem, lengths, fewest).max())
    if longest_s <= low:
        return low
    high, ring_sizes = longest_s, RingSizes(problem, lengths, fewest)
    for _ in range(30):
        middle = (low + high) / 2
        sizes = ring_sizes.smallest(middle / stages)
        fits = bool(np.all(sizes))
        if fits:
            even_s = _even_s(problem, lengths, times, sizes, held, middle / stages)
            fits = even_s + fill_s <= middle
        low, high = (low, middle) if fits else (middle, high)
    return low


def _cheapest_inside(cost: CostModel) -> CostModel:
    """A ring that fits a node may lie across nodes, should that be the faster way."""
    return replace(
        cost,
        transfer_intra=min(cost.transfer_intra, cost.transfer_inter),
        pass_intra=min(cost.pass_intra, cost.pass_inter),
    )


def _even_s(
    problem: Problem,
    lengths: Integers,
    times: Seconds,
    sizes: Integers,
    held: float,
    limit_s: float,
) -> float:
    """Seconds of all work over all ranks, sequences of `lengths` occurring `times` times.

    Sequences may share rings. So what a ring costs per rank is charged for the part of it that a
    sequence must fill at least, by its tokens or by its work within `limit_s`, and what it passes
    on is taken as hidden.
    """
    cost, tokens = problem.cost, lengths.astype(np.float64)
    transfer = np.where(sizes <= cost.node_size, cost.transfer_intra, cost.transfer_inter)
    work = tokens * (cost.a * tokens + cost.b + transfer * (sizes > 1))
    filled = np.maximum(tokens / held, work / limit_s)
    work += cost.latency * np.log2(sizes) * filled
    micro_batches = max(problem.num_ranks, np.dot(times, tokens) / held)
    return float((np.dot(times, work) + cost.fixed * micro_batches) / problem.effective_ranks)
