"""In which order the stages of a pipeline run forward and backward passes, chunks included.

A wave is one micro-batch, or the k chunks of one, on each of its ranks. The chunks of a wave run
forward in causal order and backward in reverse order, because the gradients of a chunk's keys and
values come from the chunks after it. While the last stage runs a wave backward, it runs the next
wave forward at a proportional pace. Every stage before it is one forward pass further ahead. Where
no wave has chunks, this is 1F1B: one forward, one backward, as megatron-core's schedule runs them.

All orders are functions of the chunks of each wave, so equal plans have equal orders. A rank that
lacks the last waves has the same order without their passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

from megascale.planner.ring import Ring

Pass = tuple[bool, int]
"""Whether it is a backward pass, and the number of its micro-batch."""


def chunks_of_waves(rings: Iterable[Ring]) -> list[int]:
    """How many chunks each wave of a rank has, from the rings of the rank in order."""
    return [ring.chunks for ring in rings if ring.chunk == 0]


def stage_order(chunks: Sequence[int], stages: int, stage: int) -> list[Pass]:
    """The passes of `stage` of `stages`, in order.

    Wave w has `chunks[w]` micro-batches, numbered on from those of the waves before it.
    """
    order: list[Pass] = []
    count, done = sum(chunks), 0
    for index, forwards in backward_passes(chunks):
        until = min(count, forwards + stages - 1 - stage)
        order += [(False, number) for number in range(done, until)]
        order.append((True, index))
        done = max(done, until)
    return order


def backward_passes(chunks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(micro-batch, forward passes that the last stage runs before it) of each backward pass."""
    ends = list(accumulate(chunks))
    for size, end, following in zip(chunks, ends, [*chunks, 0][1:], strict=True):
        for place in range(size):
            yield end - 1 - place, end + place * following // size


@lru_cache(maxsize=256)
def pipeline_order(chunks: tuple[int, ...], stages: int) -> tuple[tuple[int, bool, int], ...]:
    """(stage, is backward, micro-batch) of all passes, each after those that it waits for.

    A forward pass waits for the stage before, a backward pass for the stage after, and both for
    the pass before them on their own stage.
    """
    passes: list[tuple[int, bool, int]] = []
    count, done = sum(chunks), [0] * stages
    for index, forwards in backward_passes(chunks):
        for stage in range(stages):
            until = max(done[stage], min(count, forwards + stages - 1 - stage))
            passes += [(stage, False, number) for number in range(done[stage], until)]
            done[stage] = until
        passes += [(stage, True, index) for stage in reversed(range(stages))]
    return tuple(passes)


@lru_cache(maxsize=64)
def pipeline_generations(
    chunks: tuple[int, ...], stages: int
) -> tuple[tuple[tuple[int, bool, int], ...], ...]:
    """The passes of `pipeline_order`, in groups of which none waits for another of its group."""
    generation: dict[tuple[int, bool, int], int] = {}
    last = [-1] * stages
    groups: list[list[tuple[int, bool, int]]] = []
    for one in pipeline_order(chunks, stages):
        stage, backward, index = one
        before = generation.get((stage + 1 if backward else stage - 1, backward, index), -1)
        number = generation[one] = last[stage] = 1 + max(last[stage], before)
        if number == len(groups):
            groups.append([])
        groups[number].append(one)
    return tuple(map(tuple, groups))
