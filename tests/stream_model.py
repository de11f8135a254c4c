"""A model of CUDA streams and of collectives, which says whether an order of work can hang.

A rank issues operations in an order, each to a stream. An operation starts when the one before it
in its stream and all that it waits for are done. With one hardware queue it also waits until all
that was issued before it has started. A collective is done when all its ranks have started it.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from megascale.planner import StepPlan

LAYERS = 3
"""With fewer, no reduction waits for another in its stream."""


@dataclass
class Operation:
    """What a rank issues."""

    stream: str
    waits: tuple[int, ...]
    """Numbers of operations of the same rank that must be done."""
    collective: Hashable = None
    """Its name, the same on all its ranks; None: it concerns this rank alone."""


@dataclass
class Rank:
    """The operations of a rank, in the order in which it issues them."""

    operations: list[Operation] = field(default_factory=list)
    last: dict[str, int] = field(default_factory=dict)

    def issue(self, stream: str, *waits: int, collective: Hashable = None) -> int:
        """Issue an operation; its number. A collective waits for what was computed before it."""
        if collective is not None and "compute" in self.last:
            waits = (*waits, self.last["compute"])
        if stream in self.last:
            waits = (*waits, self.last[stream])
        self.operations.append(Operation(stream, waits, collective))
        self.last[stream] = len(self.operations) - 1
        return self.last[stream]


def hangs(ranks: Sequence[Rank], one_queue: bool) -> bool:
    """Whether not all operations come to their end."""
    members = Counter(one.collective for rank in ranks for one in rank.operations)
    done = [[False] * len(rank.operations) for rank in ranks]
    started: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    queues: list[tuple[int, deque[int]]] = []
    for number, rank in enumerate(ranks):
        own: dict[str, deque[int]] = defaultdict(deque)
        for at, operation in enumerate(rank.operations):
            own["" if one_queue else operation.stream].append(at)
        queues += [(number, queue) for queue in own.values()]
    moved = True
    while moved:
        moved = False
        for number, queue in queues:
            while queue and all(
                done[number][one] for one in ranks[number].operations[queue[0]].waits
            ):
                moved, at = True, queue.popleft()
                together = [(number, at)]
                if (name := ranks[number].operations[at].collective) is not None:
                    together = started[name]
                    together.append((number, at))
                    if len(together) < members[name]:
                        continue
                for other, its in together:
                    done[other][its] = True
    return not all(map(all, done))


def step(plan: StepPlan, overlap: bool, gathers: str = "upfront") -> list[Rank]:
    """What each rank issues in a step of `plan`: gathers of weights (`upfront`, or `lazy` by the
    forward pass), forward and backward passes with their rings, and the reduction of each layer
    (with `overlap` during the last backward pass)."""
    ranks = [Rank() for _ in range(plan.num_ranks)]
    for number, rank in enumerate(ranks):
        rank.issue("compute")
        gathered = {}
        if gathers == "upfront":
            for layer in range(LAYERS):
                gathered[layer] = rank.issue("data", collective=("gather", layer))
        rings = plan.rings_of(number)
        for place, ring in enumerate(rings):
            shared = ring.id if len(ring.ranks) > 1 else None
            for layer in range(LAYERS):
                if layer not in gathered:
                    gathered[layer] = rank.issue("data", collective=("gather", layer))
                _compute(rank, shared, "forward", layer, gathered[layer])
            for layer in reversed(range(LAYERS)):
                _compute(rank, shared, "backward", layer)
                if overlap and place == len(rings) - 1:
                    rank.issue("data", collective=("reduce", layer))
        if not overlap:
            for layer in reversed(range(LAYERS)):
                rank.issue("data", collective=("reduce", layer))
    return ranks


def _compute(rank: Rank, ring: int | None, passing: str, layer: int, *waits: int) -> None:
    if ring is not None:
        waits = (*waits, rank.issue("ring", *waits, collective=(ring, passing, layer)))
    rank.issue("compute", *waits)
