"""Which pieces of which documents a step trains on: a pure function of a cursor."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megascale.config.schema import DataConfig, SeenConfig, SourceConfig, StageConfig
from megascale.corpus.permutation import Permutation
from megascale.errors import UserError

Int64Array = NDArray[np.int64]
_CHUNK_DOCUMENTS = 1 << 20


class Documents(Protocol):
    """What batches need of a shard: the stored tokens of each document, and where it lies."""

    @property
    def lengths(self) -> NDArray[Any]:
        """Stored tokens of each document, integers, memory-mapped."""

    @property
    def prefix(self) -> str | Path:
        """Path of the `.bin` / `.idx` pair without its ending."""


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents: loss targets `start` to `start + length` of `document`, each int64[n].

    A document of L stored tokens has L targets and is cut into ceil(L / context) pieces.
    """

    document: Int64Array
    start: Int64Array
    length: Int64Array


class PieceIndex:
    """All pieces of a shard in document order, found by number without listing them.

    `ends[d]` is the number of pieces of documents 0 to d. Piece number p belongs to the first
    document whose end exceeds p.
    """

    def __init__(
        self, lengths: NDArray[Any], context_tokens: int, ends: Int64Array | None = None
    ) -> None:
        self.context_tokens = context_tokens
        self._lengths = np.asarray(lengths)
        if ends is None:
            chunks = _ends_in_chunks(self._lengths, context_tokens)
            ends = np.concatenate([np.empty(0, np.int64), *chunks])
        self._ends = ends
        self.num_pieces = int(self._ends[-1]) if len(self._ends) else 0
        self.num_tokens = int(self._lengths.sum(dtype=np.int64))

    @staticmethod
    def of_shard(shard: Documents, context_tokens: int) -> PieceIndex:
        """Index of a shard, kept on disk and memory-mapped, so that memory does not grow.

        It is cached in a folder `cache` beside the shard, under a name that changes when the
        shard does; where that folder cannot be written, in an unnamed temporary file.
        """
        path = _cache_path(Path(shard.prefix), context_tokens)
        lengths = np.asarray(shard.lengths)
        ends = _load_ends(path, len(lengths))
        if ends is None:
            with suppress(OSError):
                _write_ends(path, lengths, context_tokens)
            ends = _load_ends(path, len(lengths))
        if ends is None:
            ends = _temporary_ends(lengths, context_tokens)
        return PieceIndex(lengths, context_tokens, ends)

    def pieces(self, numbers: Int64Array) -> Pieces:
        """The pieces of the given numbers, each from 0 to num_pieces - 1, in that order."""
        order = np.argsort(numbers)  # searching in order keeps the search inside the caches
        ordered = np.asarray(numbers)[order]
        document = np.empty(len(ordered), dtype=np.int64)
        document[order] = found = np.searchsorted(self._ends, ordered, side="right")
        num_tokens = self._lengths[found].astype(np.int64)
        first = self._ends[found] - -(-num_tokens // self.context_tokens)
        start, length = np.empty_like(document), np.empty_like(document)
        start[order] = offset = (ordered - first) * self.context_tokens
        length[order] = np.minimum(num_tokens - offset, self.context_tokens)
        return Pieces(document, start, length)


class SeenPieces:
    """The pieces of a shard that an earlier run has read, by number in the order it read them."""

    def __init__(self, whole: PieceIndex, seen: SeenConfig) -> None:
        self._whole = whole
        self.num_pieces = min(seen.pieces, whole.num_pieces)
        self.num_tokens = min(seen.tokens, whole.num_tokens)
        self._order = Permutation(whole.num_pieces, seen.seed, seen.name, 0)

    def pieces(self, numbers: Int64Array) -> Pieces:
        """The pieces of the given numbers, each from 0 to num_pieces - 1, in that order."""
        return self._whole.pieces(self._order(np.asarray(numbers)))


def _index_of(
    shard: Documents, source: SourceConfig, context_tokens: int
) -> PieceIndex | SeenPieces:
    if source.seen is None:
        return PieceIndex.of_shard(shard, context_tokens)
    return SeenPieces(PieceIndex.of_shard(shard, source.seen.context_tokens), source.seen)


def _ends_in_chunks(lengths: NDArray[Any], context_tokens: int) -> Iterator[Int64Array]:
    total = 0
    for begin in range(0, len(lengths), _CHUNK_DOCUMENTS):
        part = lengths[begin : begin + _CHUNK_DOCUMENTS].astype(np.int64)
        sums = np.cumsum(-(-part // context_tokens)) + total
        total = int(sums[-1])
        yield sums


def _cache_path(prefix: Path, context_tokens: int) -> Path:
    identity = [str(prefix.name), str(context_tokens)]
    for ending in (".idx", ".bin"):
        with suppress(OSError):
            stat = os.stat(f"{prefix}{ending}")
            identity.append(f"{stat.st_size}/{stat.st_mtime_ns}")
    digest = hashlib.blake2b(" ".join(identity).encode(), digest_size=8).hexdigest()
    return prefix.parent / "cache" / f"{prefix.name}.pieces-{context_tokens}-{digest}.npy"


def _load_ends(path: Path, num_documents: int) -> Int64Array | None:
    try:
        ends = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if ends.shape != (num_documents,) or ends.dtype != np.int64:
        return None
    return np.asarray(ends)


def _write_ends(path: Path, lengths: NDArray[Any], context_tokens: int) -> None:
    """Write the .npy file of `PieceIndex._ends`, whole or not at all. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    header = {"descr": "<i8", "fortran_order": False, "shape": (len(lengths),)}
    try:
        with os.fdopen(handle, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            _write_chunks(file, lengths, context_tokens)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _temporary_ends(lengths: NDArray[Any], context_tokens: int) -> Int64Array | None:
    try:
        with tempfile.TemporaryFile() as file:
            _write_chunks(file, lengths, context_tokens)
            file.flush()
            return np.asarray(np.memmap(file, dtype="<i8", mode="r", shape=(len(lengths),)))
    except (OSError, ValueError):
        return None


def _write_chunks(file: IO[bytes], lengths: NDArray[Any], context_tokens: int) -> None:
    for sums in _ends_in_chunks(lengths, context_tokens):
        file.write(sums.astype("<i8").tobytes())


@dataclass(frozen=True)
class SourceCursor:
    """How far one source has been read: pieces and tokens in all, tokens in this stage."""

    pieces: int = 0
    tokens: int = 0
    stage_tokens: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where the data stands between two steps; all that a resumed run needs to go on exactly.

    Nominal tokens count `global_batch_tokens` per step; they decide where stages end and what
    each source owes. A source that is in no current blend keeps its place.
    """

    step: int = 0
    """Steps done."""
    tokens_seen: int = 0
    """Loss tokens of those steps."""
    nominal_tokens: int = 0
    """Nominal tokens of those steps."""
    stage: int = 0
    """Index of the stage of the last step done."""
    stage_nominal_tokens: int = 0
    """Nominal tokens since that stage began."""
    sources: Mapping[str, SourceCursor] = field(default_factory=dict)
    """Progress of each source that has been read."""

    def to_json(self) -> dict[str, Any]:
        """The cursor as plain values for `json.dump`."""
        return asdict(replace(self, sources=dict(self.sources)))

    @staticmethod
    def from_json(value: Any) -> Cursor:
        """Inverse of `to_json`. Raises UserError where `value` is not a cursor."""
        try:
            sources = {str(name): SourceCursor(**one) for name, one in value["sources"].items()}
            cursor = Cursor(**{**value, "sources": sources})
        except (AttributeError, KeyError, TypeError):
            raise UserError("data cursor: wrong or missing fields; the file is damaged") from None
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
    document: Int64Array
    """Document in its source, [n]."""
    start: Int64Array
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


class GlobalBatches:
    """Deals the batches of a run.

    After k steps of a stage of share w, a source has given the first count of its pieces whose
    tokens reach w * k * global_batch_tokens, so its share is exact to within one sequence at
    every step. Pieces come in the order of a permutation of the whole source, a new one for
    each epoch. A step that begins at or after the end of a stage belongs to the next one.
    """

    def __init__(self, data: DataConfig, sources: Mapping[str, Documents], seed: int) -> None:
        self.names = tuple(data.sources)
        self._data = data
        self._seed = seed
        self._index = {
            name: _index_of(sources[name], source, data.context_tokens)
            for name, source in data.sources.items()
        }
        for name in used_sources(data.stages):
            if not self._index[name].num_tokens:
                raise UserError(f"source '{name}' has no tokens; prepare it again or drop it")

    def next(self, cursor: Cursor) -> tuple[GlobalBatch, Cursor]:
        """The batch after `cursor`, and the cursor after that batch.

        Raises UserError where a source would be read more than `data.max_epochs` times.
        """
        cursor = _enter_stage(cursor, self._data.stages)
        stage_nominal_tokens = cursor.stage_nominal_tokens + self._data.global_batch_tokens
        sources, dealt = dict(cursor.sources), []
        for name, share in shares(self._data.stages[cursor.stage]).items():
            old = sources.get(name, SourceCursor())
            need = math.ceil(share * stage_nominal_tokens) - old.stage_tokens
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
            nominal_tokens=cursor.nominal_tokens + self._data.global_batch_tokens,
            stage=cursor.stage,
            stage_nominal_tokens=stage_nominal_tokens,
            sources=sources,
        )
        return batch, after

    def _take(self, name: str, begin: int, need: int, step: int) -> Pieces:
        """The first pieces from the `begin`-th on that hold at least `need` tokens."""
        index = self._index[name]
        position, parts = begin, [_NO_PIECES]
        while need > 0:
            count = int(need * index.num_pieces / index.num_tokens * 1.02) + 16
            part = index.pieces(self._order(name, position, count))
            sums = np.cumsum(part.length)
            keep = int(np.searchsorted(sums, need)) + 1
            parts.append(Pieces(part.document[:keep], part.start[:keep], part.length[:keep]))
            position += min(keep, count)
            need -= int(sums[min(keep, count) - 1])
        self._check_epochs(name, position, step)
        return _join(parts)

    def _order(self, name: str, begin: int, count: int) -> Int64Array:
        """Numbers of `count` pieces in the order in which they are read, from the `begin`-th."""
        num_pieces = self._index[name].num_pieces
        parts = []
        for epoch in range(begin // num_pieces, (begin + count - 1) // num_pieces + 1):
            first = max(begin - epoch * num_pieces, 0)
            last = min(begin + count - epoch * num_pieces, num_pieces)
            permutation = Permutation(num_pieces, self._seed, name, epoch)
            parts.append(permutation(np.arange(first, last)))
        return np.concatenate(parts)

    def _check_epochs(self, name: str, pieces: int, step: int) -> None:
        limit = self._data.max_epochs
        if limit is not None and pieces > limit * self._index[name].num_pieces:
            raise UserError(
                f"source '{name}' is used up at step {step}: data.max_epochs = {limit}; "
                "raise it, lower the share of this source or train on fewer tokens"
            )


def _enter_stage(cursor: Cursor, stages: Sequence[StageConfig]) -> Cursor:
    """The cursor moved to the stage to which its next step belongs."""
    stage = stage_at(cursor.nominal_tokens, stages)
    if stage == cursor.stage:
        return cursor
    sources = {name: replace(one, stage_tokens=0) for name, one in cursor.sources.items()}
    return replace(cursor, stage=stage, stage_nominal_tokens=0, sources=sources)


def stage_at(nominal_tokens: int, stages: Sequence[StageConfig]) -> int:
    """Index of the stage of a step that begins at `nominal_tokens`; the last one never ends."""
    end = 0
    for index, stage in enumerate(stages[:-1]):
        end += stage.tokens or 0
        if nominal_tokens < end:
            return index
    return len(stages) - 1


def shares(stage: StageConfig) -> dict[str, Fraction]:
    """Exact share of each source of a stage, without those of share 0; they sum to 1."""
    total = sum(Fraction(share) for share in stage.blend.values())
    return {name: Fraction(share) / total for name, share in stage.blend.items() if share > 0}


def used_sources(stages: Sequence[StageConfig]) -> tuple[str, ...]:
    """Names of the sources that some stage reads, each once."""
    return tuple(dict.fromkeys(name for stage in stages for name in shares(stage)))


def num_steps(data: DataConfig, tokens: int) -> int:
    """Steps of a run of `tokens`: the first count whose nominal tokens reach it."""
    return -(-tokens // data.global_batch_tokens)


def tokens_needed(data: DataConfig, tokens: int) -> dict[str, int]:
    """Tokens of each source that a run of `tokens` reads, to within one sequence per stage."""
    needed = dict.fromkeys(used_sources(data.stages), 0)
    begin, end = 0, num_steps(data, tokens) * data.global_batch_tokens
    while begin < end:
        stage = stage_at(begin, data.stages)
        stop = end
        if stage < len(data.stages) - 1:
            stage_end = sum(one.tokens or 0 for one in data.stages[: stage + 1])
            stop = min(end, num_steps(data, stage_end) * data.global_batch_tokens)
        for name, share in shares(data.stages[stage]).items():
            needed[name] += math.ceil(share * (stop - begin))
        begin = stop
    return needed


def epochs_needed(
    data: DataConfig, tokens: int, source_tokens: Mapping[str, int]
) -> dict[str, float]:
    """Passes over each source that a run of `tokens` makes; `source_tokens` are its tokens."""
    needed = tokens_needed(data, tokens)
    return {name: count / max(1, source_tokens[name]) for name, count in needed.items()}


def heldout_pieces(shard: Documents, context_tokens: int, tokens: int) -> Pieces:
    """Pieces of whole held-out documents with about `tokens` tokens in all, for evaluation.

    Documents are taken in one fixed shuffled order, the same in every run; the last one is
    taken if that brings the total nearer to `tokens`. One longer than a tenth of `tokens` is
    passed over, so that no giant speaks for all. At least one where `tokens` > 0.
    """
    lengths = np.asarray(shard.lengths)
    if not tokens or not len(lengths):
        return _NO_PIECES
    order = Permutation(len(lengths), 0, "heldout", 0)(np.arange(len(lengths)))
    fits = lengths[order] <= tokens / 10
    order = order[fits] if fits.any() else order[:1]
    sums = np.cumsum(lengths[order], dtype=np.int64)
    count = max(1, int(np.searchsorted(sums - lengths[order] // 2, tokens)))
    document = order[:count]
    index = PieceIndex(lengths[document], context_tokens)
    pieces = index.pieces(np.arange(index.num_pieces))
    return Pieces(document[pieces.document], pieces.start, pieces.length)


_NO_PIECES = Pieces(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))


def _join(parts: Sequence[Pieces]) -> Pieces:
    return Pieces(
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
    )


def _concatenate(step: int, dealt: Sequence[tuple[int, Pieces]]) -> GlobalBatch:
    joined = _join([pieces for _, pieces in dealt])
    counts = [len(pieces.length) for _, pieces in dealt]
    source = np.repeat(np.array([index for index, _ in dealt], dtype=np.int16), counts)
    length = joined.length.astype(np.int32)
    return GlobalBatch(step, source, joined.document, joined.start, length)
