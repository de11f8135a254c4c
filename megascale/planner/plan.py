"""The plan of one step: which ranks compute which sequences, in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from megascale.planner.chunk_order import Pass, chunks_of_waves, stage_order
from megascale.planner.chunk_rules import (
    check_chunk,
    check_chunk_order,
    check_cover,
    check_waves,
    peak_tokens,
    require,
)
from megascale.planner.ring import PlanError, Ring, kept_share
from megascale.planner.shares import RankMicroBatch

Mode = Literal["free", "aligned", "lockstep"]
"""How ranks may differ in what they run (see `StepPlan.mode`)."""


@dataclass(frozen=True)
class StepPlan:
    """Immutable plan of one step; the same bytes on every rank.

    Rings stand in execution order. A rank computes the rings it belongs to in that order, so
    that two ranks meet in their common rings in the same order and cannot deadlock.
    """

    num_ranks: int
    """Ranks of the HDP axis."""
    mode: Mode
    """`free`: ranks may run different numbers of rings. `aligned`: so they may, but a ring has
    the same index on all its ranks. `lockstep`: aligned, and the ranks of an expert group run
    equally many rings, padded with empty ones."""
    capacity: int
    """Most tokens whose activations one rank keeps on its device in one ring."""
    predicted_s: float
    """Seconds of the step by the cost model it was planned with."""
    lower_bound_s: float
    """Seconds that no plan of the kinds the planner considers can beat, by the same model."""
    plan_s: float = field(compare=False)
    """Seconds it took to make the plan. Plans that differ in nothing else are equal."""
    rings: tuple[Ring, ...]
    """The micro-batches of all ranks."""
    expert_group: int = 1
    """Consecutive ranks that run in lockstep; 1 in the other modes."""
    stage_layers: int = 2
    """Transformer layers of a rank; all but two of them can keep activations in host memory."""
    lengths: tuple[int, ...] = ()
    """Tokens of each sequence, where the plan is to say what each rank has of them. The plans of a
    run leave them out, since every rank knows its batch."""

    pipeline: int = 1
    """Pipeline stages, where rings are chunks: a rank holds at most that many times `capacity`
    tokens at a time. 1 in plans of whole sequences, which do not depend on it."""

    def micro_batches(self, rank: int) -> Iterator[RankMicroBatch]:
        """What `rank` runs, in order, of a plan that has its `lengths`.

        Raises ValueError for a rank that is not of the plan, and where the lengths are missing.
        """
        if not (hasattr(rank, "__index__") and 0 <= rank < self.num_ranks):
            raise ValueError(f"rank {rank!r:.40} must be one of 0 to {self.num_ranks - 1}")
        if any(ring.sequences for ring in self.rings) and not self.lengths:
            raise ValueError("the plan has no lengths; dataclasses.replace(plan, lengths=...)")
        return (RankMicroBatch.of(ring, rank, self.lengths) for ring in self.rings_of(rank))

    def rings_of(self, rank: int) -> tuple[Ring, ...]:
        """Rings that `rank` computes, in order."""
        return tuple(ring for ring in self.rings if rank in ring.ranks)

    @property
    def ends_without_rings(self) -> bool:
        """Whether no rank's last micro-batch is shared, so that what a rank begins during its last
        backward pass (a reduction over all ranks) holds up no ring that others still compute. False
        for plans with chunks."""
        shared: dict[int, bool] = {}
        for ring in self.rings:
            shared.update(dict.fromkeys(ring.ranks, len(ring.ranks) > 1))
        return not any(shared.values()) and all(ring.chunks == 1 for ring in self.rings)

    def stage_order(self, rank: int, stage: int, stages: int) -> list[Pass]:
        """(is backward, number of the micro-batch) of the passes of `rank` on `stage` of `stages`,
        in order; see `chunk_order`."""
        return stage_order(chunks_of_waves(self.rings_of(rank)), stages, stage)

    def counts(self) -> list[int]:
        """Rings that each rank computes, [ranks]; one pass over the plan."""
        counts = [0] * self.num_ranks
        for ring in self.rings:
            for rank in ring.ranks:
                counts[rank] += 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; the format is described by the fields of this class."""
        # dataclasses.asdict would copy each number by a call of its own
        values = {**vars(self), "rings": [ring.to_json() for ring in self.rings]}
        if not self.lengths:
            del values["lengths"]
        if self.pipeline == 1:
            del values["pipeline"]
        return values

    @staticmethod
    def from_json(value: dict[str, Any]) -> StepPlan:
        """Inverse of `to_json`, also after a round trip through JSON text.

        Fields that this version does not know are left out. Raises PlanError for a ring that is
        not as the fields of `Ring` say.
        """
        known = {one.name for one in fields(StepPlan)}
        value = {name: one for name, one in value.items() if name in known}
        rings = tuple(map(Ring.from_json, value["rings"]))
        return StepPlan(**{**value, "rings": rings, "lengths": tuple(value.get("lengths", ()))})

    def to_bytes(self) -> bytes:
        """Canonical bytes, the same on every machine: equal plans differ in `plan_s` alone."""
        return _canonical(self.to_json())

    @staticmethod
    def from_bytes(data: bytes) -> StepPlan:
        """Inverse of `to_bytes`."""
        return StepPlan.from_json(json.loads(data))

    def digest(self) -> str:
        """SHA-256 (hex) of what the plan says to do, without how long it took to make."""
        value = self.to_json()
        del value["plan_s"]
        return hashlib.sha256(_canonical(value)).hexdigest()

    def check(self, lengths: Sequence[int]) -> None:
        """Check every invariant for sequences of `lengths` tokens. Raises PlanError."""
        _check_sequences(self, len(lengths))
        for before, after in pairwise(self.rings):
            require(before.id < after.id, f"ring {after.id} follows ring {before.id}")
        for ring in self.rings:
            check_chunk(ring, lengths)
            _check_ring(self, ring, ring.num_tokens(lengths))
        on_rank: list[list[Ring]] = [[] for _ in range(self.num_ranks)]
        for ring in self.rings:
            for rank in ring.ranks:
                on_rank[rank].append(ring)
        for rank, rings in enumerate(on_rank):
            _check_rank(self.mode, rank, rings)
        _check_lockstep(self, [len(rings) for rings in on_rank])
        _check_chunks(self, lengths, on_rank)


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check_sequences(plan: StepPlan, num_sequences: int) -> None:
    """Each sequence is in one ring, or in chunks of one group."""
    placed = [index for ring in plan.rings if ring.chunks == 1 for index in ring.sequences]
    cut = {(index, one.group) for one in plan.rings if one.chunks != 1 for index in one.sequences}
    placed = sorted([*placed, *(index for index, _ in cut)])
    if placed != list(range(num_sequences)):
        missing = sorted(set(range(num_sequences)) - set(placed))[:3]
        raise PlanError(
            f"{len(placed)} sequences are placed, {len(set(placed))} of them different, of "
            f"{num_sequences}; missing: {missing}"
        )


def _check_ring(plan: StepPlan, ring: Ring, num_tokens: int) -> None:
    ranks = set(ring.ranks)
    known = all(0 <= rank < plan.num_ranks for rank in ranks)
    require(bool(ranks) and known, f"ring {ring.id} has ranks {ring.ranks} of {plan.num_ranks}")
    require(len(ranks) == len(ring.ranks), f"ring {ring.id} has a rank twice: {ring.ranks}")
    require(0 <= ring.offload <= 1, f"ring {ring.id} offloads {ring.offload}")
    kept = num_tokens * kept_share(ring.offload, plan.stage_layers)
    require(
        kept <= plan.capacity * len(ranks) * (1 + 1e-9),
        f"ring {ring.id} holds {num_tokens} tokens on {len(ranks)} ranks of {plan.capacity}"
        + f" and offloads {ring.offload}" * (ring.offload > 0),
    )


def _check_rank(mode: Mode, rank: int, rings: list[Ring]) -> None:
    indices = [ring.index for ring in rings]
    in_order = all(before < after for before, after in pairwise(indices))
    require(in_order, f"rank {rank} has micro-batch indices {indices}")
    if mode != "free":
        require(indices == list(range(len(rings))), f"rank {rank} has gaps: {indices}")


def _check_lockstep(plan: StepPlan, counts: list[int]) -> None:
    size = plan.expert_group
    require(size >= 1 and plan.num_ranks % size == 0, f"expert groups of {size}")
    require(size == 1 or plan.mode == "lockstep", f"expert groups of {size} in {plan.mode} mode")
    for begin in range(0, plan.num_ranks, size):
        group = counts[begin : begin + size]
        require(len(set(group)) == 1, f"ranks from {begin} run {group} micro-batches")


def _check_chunks(plan: StepPlan, lengths: Sequence[int], on_rank: list[list[Ring]]) -> None:
    """All that chunks ask of a plan whose rings are sound each."""
    require(plan.pipeline >= 1, f"the plan is for a pipeline of {plan.pipeline} stages")
    if all(ring.chunks == 1 for ring in plan.rings):
        return
    require(plan.mode != "free", "chunks in free mode, in which no pipeline runs")
    for rank, rings in enumerate(on_rank):
        check_chunk_order(rank, rings)
    check_cover(plan.rings, lengths)
    check_waves(plan.rings)
    peaks = peak_tokens(plan.rings, lengths, plan.num_ranks, plan.pipeline, plan.stage_layers)
    worst, limit = int(peaks.argmax()), plan.pipeline * plan.capacity
    require(
        peaks[worst] <= limit * (1 + 1e-9),
        f"rank {worst} holds {peaks[worst]:.0f} tokens at a time, keys and values for later "
        f"chunks included, where {plan.pipeline} stages of {plan.capacity} hold {limit}",
    )
