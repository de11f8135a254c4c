"""What plans with chunks must keep to, so that no rank waits for ever and all tokens fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from megascale.arrays import Floats
from megascale.planner.chunk_order import chunks_of_waves, stage_order
from megascale.planner.ring import WHOLE, PlanError, Ring, kept_share


def require(condition: bool, problem: str) -> None:
    """Raise PlanError with the line `problem` unless `condition` holds."""
    if not condition:
        raise PlanError(problem)


def check_chunk(ring: Ring, lengths: Sequence[int]) -> None:
    """Check the fields of chunks of one ring, for sequences of `lengths` tokens."""
    name = f"ring {ring.id}"
    if ring.chunks == 1:
        whole = (ring.group, ring.chunk, ring.chunks, ring.spans) == WHOLE
        require(whole, f"{name} has whole sequences and fields of a chunk")
        return
    require(ring.chunks > 1, f"{name} is one of {ring.chunks} chunks")
    require(0 <= ring.chunk < ring.chunks, f"{name} is chunk {ring.chunk} of {ring.chunks}")
    require(ring.group is not None, f"{name} is a chunk without a group")
    require(
        len(ring.spans) == len(ring.sequences),
        f"{name} has {len(ring.spans)} ranges of {len(ring.sequences)} sequences",
    )
    require(
        len(set(ring.sequences)) == len(ring.sequences),
        f"{name} has a sequence twice: {ring.sequences}",
    )
    for sequence, (begin, end) in zip(ring.sequences, ring.spans, strict=True):
        last = int(lengths[sequence])
        require(
            0 <= begin < end <= last,
            f"{name} computes tokens {begin} to {end} of sequence {sequence}, which has {last}",
        )


def check_rank_chunks(rank: int, rings: Sequence[Ring], lengths: Sequence[int]) -> None:
    """Check the chunks of one rank, whose `rings` are given in order, without other ranks.

    `lengths` are the tokens of all sequences of the step. Raises PlanError.
    """
    for ring in rings:
        check_chunk(ring, lengths)
    if any(ring.chunks > 1 for ring in rings):
        check_chunk_order(rank, rings)
        check_cover(rings, lengths)


def check_chunk_order(rank: int, rings: Sequence[Ring]) -> None:
    """On a rank, the chunks of a group follow each other in causal order, all on the same ranks."""
    for before, ring in pairwise([None, *rings]):
        if ring is not None:
            _check_next(rank, before, ring)
    last = rings[-1]
    require(
        last.chunk == last.chunks - 1,
        f"rank {rank} ends with chunk {last.chunk} of {last.chunks}, ring {last.id}",
    )


def _check_next(rank: int, before: Ring | None, ring: Ring) -> None:
    """Whether `ring` may follow `before` on a rank."""
    if ring.chunk == 0:
        require(
            before is None or before.chunk == before.chunks - 1,
            f"rank {rank} runs ring {ring.id} before the last chunk of a group",
        )
        require(
            ring.chunks == 1 or ring.group == ring.id,
            f"ring {ring.id} is the first of its group, which is named {ring.group}",
        )
        return
    follows = before is not None and (before.group, before.chunk + 1) == (ring.group, ring.chunk)
    require(
        follows,
        f"rank {rank} runs ring {ring.id}, chunk {ring.chunk} of group {ring.group}, "
        "after another ring than the chunk before it",
    )
    assert before is not None
    require(
        (before.ranks, before.chunks, before.index + 1) == (ring.ranks, ring.chunks, ring.index),
        f"ring {ring.id} follows ring {before.id} in group {ring.group} with other ranks, "
        "another number of chunks, or an index that is not the next",
    )


def check_cover(rings: Iterable[Ring], lengths: Sequence[int]) -> None:
    """The ranges of a sequence, in causal order, are all of it and no token twice."""
    ends: dict[tuple[int, int | None], int] = defaultdict(int)
    for ring in rings:
        if ring.chunks == 1:
            continue
        for sequence, (begin, end) in zip(ring.sequences, ring.spans, strict=True):
            at = ends[sequence, ring.group]
            fault = "overlap" if begin < at else "leave out tokens"
            require(
                begin == at,
                f"chunks of group {ring.group} {fault} at token {min(begin, at)} of sequence "
                f"{sequence}",
            )
            ends[sequence, ring.group] = end
    for (sequence, group), end in ends.items():
        length = int(lengths[sequence])
        require(
            end == length,
            f"chunks of group {group} end at token {end} of {length} of sequence {sequence}",
        )


def check_waves(rings: Iterable[Ring]) -> None:
    """All ranks cut a wave into the same number of chunks, else they would wait for each other."""
    chunk_of: dict[int, Ring] = {}
    for ring in rings:
        first = chunk_of.setdefault(ring.index, ring)
        require(
            (ring.chunk, ring.chunks) == (first.chunk, first.chunks),
            f"micro-batch {ring.index} is chunk {first.chunk} of {first.chunks} in ring {first.id} "
            f"and chunk {ring.chunk} of {ring.chunks} in ring {ring.id}",
        )


def peak_tokens(
    rings: Sequence[Ring],
    lengths: Sequence[int],
    num_ranks: int,
    stages: int,
    stage_layers: int = 2,
) -> Floats:
    """Most tokens that each rank keeps at a time on the first stage, [ranks].

    A token counts from the forward pass of its micro-batch to the backward pass. So it does while
    its keys and values are kept for later chunks. What is offloaded does not count. The stages
    after the first keep less.
    """
    waves = {ring.index: ring for ring in rings}
    kept = np.zeros((len(waves), num_ranks))
    place = {index: at for at, index in enumerate(sorted(waves))}
    for ring in rings:
        tokens = -(-ring.num_tokens(lengths) // len(ring.ranks))
        kept[place[ring.index], list(ring.ranks)] = tokens * kept_share(ring.offload, stage_layers)
    order = stage_order(chunks_of_waves(waves[index] for index in sorted(waves)), stages, 0)
    index = np.array([number for _, number in order], dtype=np.int64)
    sign = np.where([backward for backward, _ in order], -1.0, 1.0)
    peaks: Floats = (sign[:, None] * kept[index]).cumsum(axis=0).max(axis=0, initial=0.0)
    return peaks
