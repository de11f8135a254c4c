"""Random plans with chunks, for tests: any rings, any cuts, and one k for all ranks of a wave."""

from dataclasses import replace

import numpy as np

from megascale.planner import Ring, StepPlan
from megascale.planner.chunk_rules import peak_tokens


def random_plan(
    rng: np.random.Generator,
    num_ranks: int,
    stages: int,
    *,
    mode: str = "aligned",
    most_waves: int = 4,
    most_chunks: int = 5,
    most_tokens: int = 40,
) -> StepPlan:
    """A valid plan with its `lengths`, and a capacity that it just keeps to."""
    rings: list[Ring] = []
    lengths: list[int] = []
    index, on = 0, np.arange(num_ranks)
    for _ in range(int(rng.integers(1, most_waves + 1))):
        chunks = int(rng.integers(1, most_chunks + 1))
        groups = [_group(rng, ranks, lengths, chunks, most_tokens) for ranks in _rings(rng, on)]
        first = len(rings)
        for chunk in range(chunks):
            for place, group in enumerate(groups):
                id_ = len(rings)
                made = replace(group[chunk], id=id_, index=index + chunk)
                if chunks > 1:
                    made = replace(made, group=first + place, chunk=chunk, chunks=chunks)
                rings.append(made)
        index += chunks
        if mode == "aligned":  # some ranks have no further wave
            on = on[rng.random(len(on)) < 0.9]
        if not len(on):
            break
    plan = StepPlan(
        num_ranks, mode, 1, 1.0, 0.0, 0.0, tuple(rings),
        expert_group=num_ranks if mode == "lockstep" else 1, lengths=tuple(lengths),
        pipeline=stages if any(ring.chunks > 1 for ring in rings) else 1,
    )  # fmt: skip
    return replace(plan, capacity=_capacity(plan))


def _rings(rng: np.random.Generator, ranks: np.ndarray) -> list[tuple[int, ...]]:
    order = rng.permutation(ranks)
    cuts = np.flatnonzero(rng.random(len(order) - 1) < 0.5) + 1
    return [tuple(part.tolist()) for part in np.split(order, cuts)]


def _group(
    rng: np.random.Generator,
    ranks: tuple[int, ...],
    lengths: list[int],
    chunks: int,
    most_tokens: int,
) -> list[Ring]:
    """Micro-batches of a few new sequences, cut anywhere; ids and indices are still to come."""
    new = rng.integers(1, most_tokens + 1, int(rng.integers(0, 4))).tolist()
    numbers = list(range(len(lengths), len(lengths) + len(new)))
    lengths += new
    if chunks == 1:
        return [Ring(0, ranks, tuple(numbers), 0.0, 0)]
    parts: list[list[tuple[int, tuple[int, int]]]] = [[] for _ in range(chunks)]
    for number, length in zip(numbers, new, strict=True):
        cuts = [0, *sorted(rng.integers(0, length + 1, chunks - 1).tolist()), length]
        for part, begin, end in zip(parts, cuts, cuts[1:], strict=False):
            if begin < end:
                part.append((number, (begin, end)))
    return [
        Ring(0, ranks, tuple(n for n, _ in part), 0.0, 0, spans=tuple(span for _, span in part))
        for part in parts
    ]


def _capacity(plan: StepPlan) -> int:
    largest = max(-(-ring.num_tokens(plan.lengths) // len(ring.ranks)) for ring in plan.rings)
    peak = peak_tokens(plan.rings, plan.lengths, plan.num_ranks, plan.pipeline).max()
    return max(1, largest, -(-int(peak) // plan.pipeline))
