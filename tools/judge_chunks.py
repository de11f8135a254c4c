"""What the judge says of chunks: whether their rules hold, and in which order they run.

Written from the guide of the planner alone, as `tools/judge.py` is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
RingJson = Mapping[str, Any]


def stage_slots(chunks: Integers, ahead: int) -> tuple[Integers, Integers]:
    """Places of the forward and of the backward pass of each micro-batch in the order of a stage.

    `chunks` has, for each micro-batch of a rank, the chunks of its group. The stage is `ahead`
    forward passes further than the last one. That runs a group backward from its last chunk, and
    meanwhile the same part of the next group forward.
    """
    count = len(chunks)
    groups = []
    first = 0
    while first < count:
        groups.append((first, min(count, first + max(1, int(chunks[first])))))
        first = groups[-1][1]
    backward: list[int] = []
    forwards_before: list[int] = []
    for number, (begin, end) in enumerate(groups):
        following = groups[number + 1] if number + 1 < len(groups) else (end, end)
        size, next_size = end - begin, following[1] - following[0]
        backward += range(end - 1, begin - 1, -1)
        forwards_before += [end + done * next_size // size for done in range(size)]
    before = np.minimum(count, np.array(forwards_before, dtype=np.int64) + ahead)
    backward_slot = np.empty(count, dtype=np.int64)
    backward_slot[backward] = np.arange(count) + before
    forward_slot = np.arange(count) + np.searchsorted(before, np.arange(count), side="right")
    return forward_slot, backward_slot


def chunk_problems(plan: Mapping[str, Any], lengths: Sequence[int], stages: int) -> list[str]:
    """Rules of chunks that a plan breaks, a line each."""
    if all(ring.get("chunks", 1) == 1 for ring in plan["rings"]):
        marked = [ring["id"] for ring in plan["rings"] if {"group", "chunk", "spans"} & {*ring}]
        return [f"whole sequences with fields of chunks: {marked[0]}"] if marked else []
    found = dict.fromkeys([*_groups(plan["rings"], lengths), *_waves(plan["rings"])])
    if plan["mode"] == "free":
        found["chunks in free mode"] = None
    if found:
        return list(found)
    if plan.get("pipeline", 1) != stages:
        return [f"chunks for {plan.get('pipeline', 1)} stages, judged with {stages}"]
    return list(_memory(plan, lengths, stages))


def _groups(rings: Sequence[RingJson], lengths: Sequence[int]) -> Iterator[str]:
    groups: dict[int, list[RingJson]] = defaultdict(list)
    for ring in rings:
        if ring.get("chunks", 1) != 1:
            groups[ring.get("group", -1)].append(ring)
    owner: dict[int, int] = {}
    for name, chunks in groups.items():
        first = chunks[0]
        wanted = [(place, len(chunks), first["index"] + place) for place in range(len(chunks))]
        if [(one.get("chunk", 0), one["chunks"], one["index"]) for one in chunks] != wanted:
            yield f"group {name} has chunks that are missing, or out of order"
        if first["id"] != name or any(one["ranks"] != first["ranks"] for one in chunks):
            yield f"group {name} has another first ring, or other ranks in some chunks"
        ends: dict[int, int] = defaultdict(int)
        for one in chunks:
            if len(one.get("spans", ())) != len(one["sequences"]):
                yield f"ring {one['id']} has not one range for each sequence"
            if len({*one["sequences"]}) < len(one["sequences"]):
                yield f"ring {one['id']} has a sequence twice"
            for sequence, (begin, end) in zip(one["sequences"], one.get("spans", ()), strict=False):
                if begin != ends[sequence] or end <= begin:
                    yield f"group {name} overlaps or leaves out tokens of sequence {sequence}"
                ends[sequence] = end
        for sequence, end in ends.items():
            if end != lengths[sequence] or owner.setdefault(sequence, name) != name:
                yield f"group {name} does not compute all of sequence {sequence}"


def _waves(rings: Sequence[RingJson]) -> Iterator[str]:
    kinds: dict[int, tuple[int, int]] = {}
    for ring in rings:
        kind = (ring.get("chunk", 0), ring.get("chunks", 1))
        if kinds.setdefault(ring["index"], kind) != kind:
            yield f"micro-batch {ring['index']} is cut differently on other ranks"


def _memory(plan: Mapping[str, Any], lengths: Sequence[int], stages: int) -> Iterator[str]:
    """Tokens that a rank keeps on its first stage, from a forward pass to its backward pass."""
    layers = max(2, plan.get("stage_layers", 2))
    mine: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for ring in plan["rings"]:
        spans = ring.get("spans") or [(0, lengths[i]) for i in ring["sequences"]]
        tokens = -(-sum(end - begin for begin, end in spans) // len(ring["ranks"]))
        kept = tokens * (1 - ring["offload"] * (layers - 2) / layers)
        for rank in ring["ranks"]:
            mine[rank].append((ring.get("chunks", 1), kept))
    limit = stages * plan["capacity"]
    over = {}
    for rank, rings in mine.items():
        forward, backward = stage_slots(np.array([chunks for chunks, _ in rings]), stages - 1)
        change = np.zeros(2 * len(rings))
        change[forward] = [kept for _, kept in rings]
        change[backward] = [-kept for _, kept in rings]
        peak = change.cumsum().max()
        if peak > limit * (1 + 1e-9):
            over[rank] = peak
    if over:
        worst = max(over, key=lambda rank: over[rank])
        yield f"rank {worst} keeps {over[worst]:.0f} tokens of {limit}, and {len(over) - 1} more"
