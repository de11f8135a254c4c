"""Which pieces of which documents a step trains on: a pure function of a cursor."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Integers
from megascale.config.schema import ORDER_VERSION, DataConfig, SourceConfig, StageConfig
from megascale.corpus.pieces import (
    NO_PIECES,
    Documents,
    Order,
    PieceIndex,
    Pieces,
    ReadIndex,
    documents_of,
    epochs_begun,
    join,
    left_by,
    require_order,
)
from megascale.errors import UserError

MOST_PIECES = 2**20
"""Sequences of a source in a batch, more than any run has."""


@dataclass(frozen=True)
class SourceCursor:
    """How far one source has been read: pieces of its order, its tokens in this run and stage."""

    pieces: int = 0
    tokens: int = 0
    stage_tokens: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where the data stands between two steps; all that a resumed run needs to go on exactly.

    Nominal tokens count `step_tokens` per step; they decide what each source owes. A source that is
    in no current blend keeps its place.
    """

    step: int = 0
    """Steps done."""
    tokens_seen: int = 0
    """Loss tokens of those steps; they decide where stages end."""
    stage: int = 0
    """Index of the stage of the last step done."""
    stage_nominal_tokens: int = 0
    """Nominal tokens since that stage began."""
    sources: Mapping[str, SourceCursor] = field(default_factory=dict)
    """Progress of each source that has been read."""

    def to_json(self) -> dict[str, Any]:
        """The cursor as plain values for `json.dump`."""
        return {**asdict(replace(self, sources=dict(self.sources))), "order": ORDER_VERSION}

    @staticmethod
    def from_json(value: Any) -> Cursor:
        """Inverse of `to_json`. Raises UserError where `value` is not a cursor, or was written by a
        version that read documents in another order.

        Versions before 0.2 also stored the nominal tokens of the run, which decide nothing now.
        """
        try:
            value = dict(value)
            order = value.pop("order", 1)
            sources = {str(name): SourceCursor(**one) for name, one in value["sources"].items()}
            value.pop("nominal_tokens", None)
            cursor = Cursor(**{**value, "sources": sources})
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError("data cursor: wrong or missing fields; the file is damaged") from None
        require_order(order)
        numbers = [n for one in sources.values() for n in asdict(one).values()]
        numbers += [number for name, number in value.items() if name != "sources"]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise UserError("data cursor: every field must be a whole number, at least 0")
        return cursor


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences of one optimizer step, in an order that knows nothing of ranks."""

    step: int
    """Number of the step, from 0."""
    source: NDArray[np.int16]
    """Index into the source names, [n]."""
    document: Integers
    """Document in its source, [n]."""
    start: Integers
    """Offset of the first loss target in its document, [n]."""
    length: NDArray[np.int32]
    """Loss targets, [n]."""

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch."""
        return len(self.length)

    @property
    def num_tokens(self) -> int:
        """Loss tokens of the batch."""
        return int(self.length.sum(dtype=np.int64))


def step_tokens(data: DataConfig, tokens_seen: float) -> int:
    """Nominal loss tokens of the step that begins after `tokens_seen`; see `BatchRampConfig`."""
    whole, ramp = data.global_batch_tokens, data.batch_ramp
    if ramp is None or tokens_seen >= ramp.over_tokens:
        return whole
    return ramp.start_tokens + int((whole - ramp.start_tokens) * tokens_seen) // ramp.over_tokens


class GlobalBatches:
    """Deals the batches of a run.

    After k steps of a stage of share w, a source has given the first count of its pieces whose
    tokens reach w times the nominal tokens of these steps (k * global_batch_tokens, or fewer while
    batches grow), so its share is exact to within one sequence at
    every step. Where all sources have given that much already, because sequences are long beside
    a batch, the source with the fewest tokens for its share gives one more piece: no batch is
    empty, and shares still hold to within one sequence. Pieces come in the order of a permutation
    of the whole source, a new one for each epoch. A step that begins at or after the end of a
    stage, in loss tokens of the run, belongs to the next one.
    """

    def __init__(self, data: DataConfig, sources: Mapping[str, Documents], seed: int) -> None:
        self.names = tuple(data.sources)
        self.data = data
        self._orders = {
            name: _order_of(sources[name], name, source, data.context_tokens, seed)
            for name, source in data.sources.items()
        }
        for name in used_sources(data.stages):
            if not self._orders[name].tokens_per_piece:
                raise UserError(f"source '{name}' has no tokens; prepare it again or drop it")

    def next(self, cursor: Cursor) -> tuple[GlobalBatch, Cursor]:
        """The batch after `cursor`, and the cursor after that batch.

        Raises UserError where a source would be read more than `data.max_epochs` times.
        """
        cursor = _enter_stage(cursor, self.data.stages)
        stage_nominal_tokens = cursor.stage_nominal_tokens + step_tokens(
            self.data, cursor.tokens_seen
        )
        sources, dealt = dict(cursor.sources), []
        owed, blend = {}, shares(self.data.stages[cursor.stage])
        for name, share in blend.items():
            sources.setdefault(name, SourceCursor(self.data.sources[name].begin))
            owed[name] = math.ceil(share * stage_nominal_tokens) - sources[name].stage_tokens
        if max(owed.values()) <= 0:
            owed[min(blend, key=lambda name: sources[name].stage_tokens / blend[name])] = 1
        for name, need in owed.items():
            old = sources[name]
            pieces = self._take(name, old.pieces, need, cursor.step)
            tokens = int(pieces.length.sum())
            sources[name] = SourceCursor(
                old.pieces + len(pieces.length), old.tokens + tokens, old.stage_tokens + tokens
            )
            dealt.append((self.names.index(name), pieces))
        batch = _concatenate(cursor.step, dealt)
        after = Cursor(
            step=cursor.step + 1,
            tokens_seen=cursor.tokens_seen + batch.num_tokens,
            stage=cursor.stage,
            stage_nominal_tokens=stage_nominal_tokens,
            sources=sources,
        )
        return batch, after

    def rates(self, stage: int, tokens_seen: float) -> tuple[float, float]:
        """Mean loss tokens and mean pieces of a step of a stage, over many steps like the one that
        begins after `tokens_seen`.

        Where a piece is longer than the batch, as the blend draws them, a step is one piece.
        """
        blend = shares(self.data.stages[stage])
        pieces = sum(
            float(share) / self._orders[name].tokens_per_piece for name, share in blend.items()
        )
        tokens = max(float(step_tokens(self.data, tokens_seen)), 1 / pieces)
        return tokens, tokens * pieces

    def _take(self, name: str, begin: int, need: int, step: int) -> Pieces:
        """The first pieces from the `begin`-th on that hold at least `need` tokens."""
        order, position, parts = self._orders[name], begin, [NO_PIECES]
        while need > 0:
            count = int(need / order.tokens_per_piece * 1.02) + 16
            if count > MOST_PIECES:
                raise UserError(
                    f"source '{name}': step {step} would take about {count:,} sequences, above "
                    f"{MOST_PIECES:,}; set data.global_batch_tokens to "
                    f"{int(MOST_PIECES * order.tokens_per_piece)} or less"
                )
            part = order.pieces(position, count)
            sums = np.cumsum(part.length)
            keep = int(np.searchsorted(sums, need)) + 1
            parts.append(Pieces(part.document[:keep], part.start[:keep], part.length[:keep]))
            position += min(keep, count)
            need -= int(sums[min(keep, count) - 1])
        self._check_epochs(name, position, step)
        return join(parts)

    def _check_epochs(self, name: str, pieces: int, step: int) -> None:
        limit = self.data.max_epochs
        if limit is not None and pieces > self._orders[name].pieces_of(limit):
            raise UserError(
                f"source '{name}' is used up at step {step}: data.max_epochs = {limit}; "
                "raise it, lower the share of this source or train on fewer tokens"
            )


def _order_of(
    shard: Documents, name: str, source: SourceConfig, context_tokens: int, seed: int
) -> Order:
    shard = documents_of(shard, source)
    reads = source.earlier.reads if source.earlier is not None else ()
    if source.replay:
        seen = ReadIndex(shard, reads)
        return Order(name, seed, seen, seen)
    whole = PieceIndex.of_shard(shard, context_tokens)
    first = left_by(shard, reads, context_tokens)
    return Order(name, seed, first, whole, epochs_begun(shard, reads))


def _enter_stage(cursor: Cursor, stages: Sequence[StageConfig]) -> Cursor:
    """The cursor moved to the stage to which its next step belongs."""
    stage = stage_at(cursor.tokens_seen, stages)
    return cursor if stage == cursor.stage else _at_stage(cursor, stage)


def with_stages(cursor: Cursor, was: Sequence[StageConfig], now: Sequence[StageConfig]) -> Cursor:
    """The cursor of a run whose stages are others from here on: new shares count from now."""
    stage = stage_at(cursor.tokens_seen, now)
    if stage == cursor.stage and shares(was[stage]) == shares(now[stage]):
        return cursor
    return _at_stage(cursor, stage)


def _at_stage(cursor: Cursor, stage: int) -> Cursor:
    """The cursor at the begin of a stage."""
    sources = {name: replace(one, stage_tokens=0) for name, one in cursor.sources.items()}
    return replace(cursor, stage=stage, stage_nominal_tokens=0, sources=sources)


def stage_ends(stages: Sequence[StageConfig]) -> list[int]:
    """Tokens of the run at which each stage but the last ends; the last one never does."""
    return list(accumulate(stage.tokens or 0 for stage in stages[:-1]))


def stage_at(tokens_seen: int, stages: Sequence[StageConfig]) -> int:
    """Index of the stage of a step that begins at `tokens_seen`."""
    return bisect_right(stage_ends(stages), tokens_seen)


def shares(stage: StageConfig) -> dict[str, Fraction]:
    """Exact share of each source of a stage, without those of share 0; they sum to 1."""
    total = sum(Fraction(share) for share in stage.blend.values())
    return {name: Fraction(share) / total for name, share in stage.blend.items() if share > 0}


def used_sources(stages: Sequence[StageConfig]) -> tuple[str, ...]:
    """Names of the sources that some stage reads, each once."""
    return tuple(dict.fromkeys(name for stage in stages for name in shares(stage)))


def _concatenate(step: int, dealt: Sequence[tuple[int, Pieces]]) -> GlobalBatch:
    joined = join([pieces for _, pieces in dealt])
    counts = [len(pieces.length) for _, pieces in dealt]
    source = np.repeat(np.array([index for index, _ in dealt], dtype=np.int16), counts)
    length = joined.length.astype(np.int32)
    return GlobalBatch(step, source, joined.document, joined.start, length)
