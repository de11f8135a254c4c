"""Micro-batches of sequences that are in memory, for training loops of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from megascale.mesh.chunk_groups import ChunkGroups
from megascale.mesh.packing import MicroBatch, TokenSequence, pack
from megascale.mesh.ring_share import RingShare
from megascale.planner.plan import StepPlan
from megascale.planner.shares import RankMicroBatch
from megascale.runtime.distributed import HdpAxis

Part = Callable[[int, Sequence[tuple[int, int]]], TokenSequence]
"""The given (start, tokens) of a sequence of the batch, joined."""


def micro_batches(
    plan: StepPlan,
    rank: int,
    sequences: Sequence[TokenSequence],
    device: torch.device | str = "cpu",
    axis: HdpAxis | None = None,
    multiple: int = 1,
    pad_id: int = 0,
) -> Iterator[MicroBatch]:
    """What `rank` runs, in order: its parts of `sequences`, packed into tensors on `device`.

    `sequences` are those of the whole batch, in the order of the lengths that were planned. A ring
    of two ranks or more needs `axis`, whose position `rank` this process is. Each micro-batch is
    padded to a multiple of `multiple` tokens by `pad_id`; padding counts in no loss. Chunks of
    the same sequences keep keys and values for each other: run all of a group forward, and then all
    backward in reverse order. Raises ValueError, at once, for sequences that are no ids or do not
    fit the plan, a rank that is not of the plan, and where an axis is missing.
    """
    lengths = tuple(_length(index, sequence) for index, sequence in enumerate(sequences))
    cut = {(one.group, index) for one in plan.rings if one.chunks > 1 for index in one.sequences}
    planned = len(cut) + sum(len(one.sequences) for one in plan.rings if one.chunks == 1)
    if planned != len(lengths) or plan.lengths not in ((), lengths):
        raise ValueError("the plan is for other sequences than these")
    if multiple < 1:
        raise ValueError(f"multiple = {multiple} must be at least 1")
    mine = list(replace(plan, lengths=lengths).micro_batches(rank))
    for batch in mine:
        if len(batch.ranks) > 1:
            _given_axis(batch, axis)

    def part(index: int, spans: Sequence[tuple[int, int]]) -> TokenSequence:
        whole = sequences[index]
        places = [np.arange(start, start + tokens) for start, tokens in spans]
        kept = np.concatenate([np.empty(0, np.int64), *places])
        return TokenSequence(np.asarray(whole.inputs)[kept], np.asarray(whole.targets)[kept])

    place, groups = torch.device(device), ChunkGroups()
    return (packed_part(batch, part, place, axis, multiple, pad_id, groups) for batch in mine)


def _length(index: int, sequence: object) -> int:
    """Tokens of a sequence. Raises ValueError for what is no TokenSequence of ids."""
    if not isinstance(sequence, TokenSequence):
        kind = type(sequence).__name__
        raise ValueError(f"sequence {index} is {kind}; give TokenSequence(inputs, targets)")
    inputs, targets = (np.asarray(part) for part in (sequence.inputs, sequence.targets))
    if inputs.ndim != 1 or inputs.shape != targets.shape:
        raise ValueError(
            f"sequence {index} has inputs of shape {inputs.shape} and targets of {targets.shape}; "
            "both must be one list of ids, and equally long"
        )
    if not all(np.issubdtype(part.dtype, np.integer) for part in (inputs, targets)):
        raise ValueError(f"sequence {index} has ids of {inputs.dtype}; ids are whole numbers")
    return len(targets)


def packed_part(
    mine: RankMicroBatch,
    part: Part,
    device: torch.device,
    axis: HdpAxis | None,
    multiple: int,
    pad_id: int,
    groups: ChunkGroups,
    sources: Sequence[int] = (),
    windows: Sequence[int | None] = (None,),
) -> MicroBatch:
    """A rank's micro-batch as tensors; `part` gives its part of each sequence.

    `groups` makes the shares of all chunks of this rank. `sources` number the source of each of its
    sequences; `windows` are those of attention in the layers of the model.
    Raises ValueError for a ring of two ranks or more without an axis.
    """
    ring: RingShare | None = None
    ranks, group = mine.ranks, None
    if len(ranks) > 1:
        axis = _given_axis(mine, axis)
        ranks, group = tuple(axis.ranks[position] for position in ranks), axis.group
    if mine.ring.chunks > 1:
        ring = groups.share(mine, ranks, group)
    elif len(ranks) > 1:
        ring = RingShare(mine.share.place, mine.share.bounds, ranks, group)
    parts = [part(index, mine.share.spans(place)) for place, index in enumerate(mine.sequences)]
    packed = pack(parts, pad_id, multiple, device, ring, sources, windows)
    return replace(packed, offload=mine.offload)


def _given_axis(mine: RankMicroBatch, axis: HdpAxis | None) -> HdpAxis:
    if axis is None:
        raise ValueError(f"ring {mine.ring.id} has {len(mine.ranks)} ranks; give an axis")
    return axis
