"""Documents cut into pieces: all of a shard, what earlier runs have read, and what they left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Integers
from megascale.config.schema import ORDER_VERSION, ReadConfig, SourceConfig
from megascale.corpus.cache import cache_path, digest, kept
from megascale.corpus.fim import BlockRule
from megascale.corpus.shuffle import Permutation
from megascale.errors import UserError

_CHUNK = 1 << 20


class Documents(Protocol):
    """What batches need of a shard: the stored tokens of each document, and where it lies."""

    @property
    def lengths(self) -> NDArray[Any]:
        """Stored tokens of each document, integers, memory-mapped."""

    @property
    def prefix(self) -> str | Path:
        """Path of the `.bin` / `.idx` pair without its ending."""


@dataclass(frozen=True)
class DocumentsInRange:
    """The documents of a shard that have `shortest` to `longest` tokens; None: no limit above.

    The others count as empty, so that a document has the same number as in the shard.
    """

    shard: Documents
    shortest: int
    longest: int | None

    @property
    def prefix(self) -> str | Path:
        """That of the shard."""
        return self.shard.prefix

    @property
    def mark(self) -> str:
        """Stands for the range in names of files."""
        return f"{self.shortest}-to-{'any' if self.longest is None else self.longest}"

    @property
    def lengths(self) -> Integers:
        """Tokens of each document, 0 outside the range; kept on disk and memory-mapped."""
        lengths = np.asarray(self.shard.lengths)
        path = cache_path(Path(self.prefix), f"lengths-{self.mark}")
        return kept(path, lambda: self._chunks(lengths), len(lengths))

    def _chunks(self, lengths: NDArray[Any]) -> Iterator[Integers]:
        for begin in range(0, len(lengths), _CHUNK):
            part = lengths[begin : begin + _CHUNK].astype(np.int64)
            is_read = part >= self.shortest
            if self.longest is not None:
                is_read &= part <= self.longest
            yield np.where(is_read, part, 0)


@dataclass(frozen=True)
class DocumentsAsRead:
    """Documents by the tokens that a source with fill-in-the-middle reads of them."""

    documents: Documents
    rule: BlockRule

    @property
    def prefix(self) -> str | Path:
        """That of the shard."""
        return self.documents.prefix

    @property
    def mark(self) -> str:
        """Stands for range and rule in names of files."""
        return "-".join(filter(None, [getattr(self.documents, "mark", ""), self.rule.mark]))

    @property
    def lengths(self) -> Integers:
        """Tokens that are read of each document; kept on disk and memory-mapped."""
        lengths = np.asarray(self.documents.lengths)
        path = cache_path(Path(self.prefix), f"lengths-{self.mark}")
        return kept(path, lambda: self._chunks(lengths), len(lengths))

    def _chunks(self, lengths: NDArray[Any]) -> Iterator[Integers]:
        for begin in range(0, len(lengths), _CHUNK):
            yield self.rule.lengths(lengths[begin : begin + _CHUNK], begin)


def documents_in_range(shard: Documents, source: SourceConfig) -> Documents:
    """The documents of a source's training shard that it reads, as they are stored."""
    shortest, longest = source.min_document_tokens, source.max_document_tokens
    if not shortest and longest is None:
        return shard
    return DocumentsInRange(shard, shortest, longest)


def documents_of(shard: Documents, source: SourceConfig) -> Documents:
    """The documents of a source's training shard as it reads them; its config is finalized."""
    documents = documents_in_range(shard, source)
    return documents if source.fim is None else DocumentsAsRead(documents, BlockRule.of(source.fim))


def _cache_path(documents: Documents, kind: str) -> Path:
    """Where numbers that follow from documents are kept."""
    if isinstance(documents, (DocumentsInRange, DocumentsAsRead)):
        kind = f"{kind}-{documents.mark}"
    return cache_path(Path(documents.prefix), kind)


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents: loss targets `start` to `start + length` of `document`, each int64[n].

    A document of L stored tokens has L targets and is cut into ceil(L / context) pieces.
    """

    document: Integers
    start: Integers
    length: Integers


class Index(Protocol):
    """Pieces that are found by number."""

    num_pieces: int
    num_tokens: int
    """Of all of them; of what was read, about."""

    def pieces(self, numbers: Integers) -> Pieces:
        """The pieces of the given numbers, each from 0 to num_pieces - 1, in that order."""


class PieceIndex:
    """All pieces of a shard in document order, found by number without listing them.

    `ends[d]` is the number of pieces of documents 0 to d. Piece number p belongs to the first
    document whose end exceeds p.
    """

    def __init__(
        self, lengths: NDArray[Any], context_tokens: int, ends: Integers | None = None
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
        """Index of a shard, kept on disk and memory-mapped, so that memory does not grow."""
        lengths = np.asarray(shard.lengths)
        path = _cache_path(shard, f"pieces-{context_tokens}")
        ends = kept(path, lambda: _ends_in_chunks(lengths, context_tokens), len(lengths))
        return PieceIndex(lengths, context_tokens, ends)

    def pieces(self, numbers: Integers) -> Pieces:
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


class LeftIndex:
    """What earlier runs have left of a shard: stretches of documents, cut into pieces.

    `spans` are document, start and length of each stretch, int64[n, 3].
    """

    def __init__(self, spans: Integers, lengths_index: PieceIndex) -> None:
        self._spans, self._index = spans, lengths_index
        self.num_pieces, self.num_tokens = lengths_index.num_pieces, lengths_index.num_tokens

    def pieces(self, numbers: Integers) -> Pieces:
        """The pieces of the given numbers, each from 0 to num_pieces - 1, in that order."""
        found = self._index.pieces(numbers)
        spans = self._spans[found.document]
        return Pieces(spans[:, 0], spans[:, 1] + found.start, found.length)


def require_order(version: int) -> None:
    """Raise UserError where documents were read in the order of another version."""
    if version != ORDER_VERSION:
        raise UserError(
            f"documents were read in order {version!r:.20}, and this version reads them in order "
            f"{ORDER_VERSION}: go on with the version of megascale that wrote it, or start anew"
        )


def left_by(shard: Documents, reads: Sequence[ReadConfig], context_tokens: int) -> Index:
    """What `reads`, one after another, have left of a shard, cut into pieces of `context_tokens`.

    Each of them read the first pieces of what those before it had left, shuffled; one that came
    to the end of that went on with the whole shard, shuffled anew for every epoch. One of no
    pieces leaves all.
    """
    for read in reads:
        require_order(read.order)
    if not reads or not reads[-1].pieces:
        return PieceIndex.of_shard(shard, context_tokens)
    key = repr([(one.name, one.seed, one.context_tokens, one.pieces) for one in reads])
    spans = f"left-{digest(key)}"
    flat = kept(_cache_path(shard, spans), lambda: _spans_left(shard, reads))
    spans_n3 = flat.reshape(-1, 3)
    ends = kept(
        _cache_path(shard, f"{spans}-{context_tokens}"),
        lambda: _ends_in_chunks(spans_n3[:, 2], context_tokens),
        len(spans_n3),
    )
    return LeftIndex(spans_n3, PieceIndex(spans_n3[:, 2], context_tokens, ends))


def epochs_begun(shard: Documents, reads: Sequence[ReadConfig]) -> int:
    """How often `reads`, one after another, have come to the end of a shard."""
    ended = 0
    for number, read in enumerate(reads):
        if not read.pieces:
            continue
        left = left_by(shard, reads[:number], read.context_tokens).num_pieces
        if read.pieces >= left:
            whole = PieceIndex.of_shard(shard, read.context_tokens).num_pieces
            ended += 1 + (read.pieces - left) // max(1, whole)
    return ended


def _spans_left(shard: Documents, reads: Sequence[ReadConfig]) -> Iterator[Integers]:
    """Flat triples of document, start and length of the stretches that `reads` have left."""
    *before, last = reads
    index, epoch, count = left_by(shard, before, last.context_tokens), 0, last.pieces
    if count >= index.num_pieces:
        more = count - index.num_pieces
        index = PieceIndex.of_shard(shard, last.context_tokens)
        epochs, count = divmod(more, index.num_pieces)
        epoch = 1 + epochs
    is_read = np.zeros(index.num_pieces, dtype=bool)
    order = Permutation(index.num_pieces, last.seed, last.name, epoch)
    for begin in range(0, count, _CHUNK):
        is_read[order(np.arange(begin, min(begin + _CHUNK, count)))] = True
    for begin in range(0, index.num_pieces, _CHUNK):
        yield joined(index.pieces(begin + np.flatnonzero(~is_read[begin : begin + _CHUNK])))


def joined(pieces: Pieces) -> Integers:
    """Flat triples of the stretches that `pieces`, in document order, make up."""
    if not len(pieces.length):
        return np.empty(0, np.int64)
    begins = np.ones(len(pieces.length), dtype=bool)
    begins[1:] = np.diff(pieces.document) != 0
    begins[1:] |= pieces.start[1:] != (pieces.start + pieces.length)[:-1]
    first = np.flatnonzero(begins)
    lengths = np.add.reduceat(pieces.length, first)
    return np.stack([pieces.document[first], pieces.start[first], lengths], axis=1).ravel()


class ReadIndex:
    """The pieces of a shard that `reads` have read, one after another, by number in that order."""

    def __init__(self, shard: Documents, reads: Sequence[ReadConfig]) -> None:
        self.num_tokens = 0
        self._parts: list[tuple[Index, Permutation, int]] = []
        for number, read in enumerate(reads):
            if not read.pieces:
                continue
            index = left_by(shard, reads[:number], read.context_tokens)
            if read.pieces >= index.num_pieces:  # all that was left: by now, everything
                whole = PieceIndex.of_shard(shard, read.context_tokens)
                order = Permutation(whole.num_pieces, read.seed, read.name, 0)
                self._parts, self.num_tokens = [(whole, order, whole.num_pieces)], whole.num_tokens
                break
            order = Permutation(index.num_pieces, read.seed, read.name, 0)
            self._parts.append((index, order, read.pieces))
            self.num_tokens += index.num_tokens * read.pieces // max(1, index.num_pieces)
        self._ends = np.cumsum([count for _, _, count in self._parts])
        self.num_pieces = int(self._ends[-1])

    def pieces(self, numbers: Integers) -> Pieces:
        """The pieces of the given numbers, each from 0 to num_pieces - 1, in that order."""
        numbers = np.asarray(numbers)
        part_of = np.searchsorted(self._ends, numbers, side="right")
        columns = np.empty((3, len(numbers)), dtype=np.int64)
        for part, (index, order, count) in enumerate(self._parts):
            mine = np.flatnonzero(part_of == part)
            found = index.pieces(order(numbers[mine] - (self._ends[part] - count)))
            columns[:, mine] = found.document, found.start, found.length
        return Pieces(*columns)


class Order:
    """The pieces of a source in the order in which a run reads them, without end.

    Those of `first` come first, shuffled; then those of `whole`, shuffled anew for every epoch.
    """

    def __init__(
        self, name: str, seed: int, first: Index, whole: Index, epochs_before: int = 0
    ) -> None:
        """`epochs_before` are those that earlier runs have ended."""
        self._name, self._seed, self._first, self._whole = name, seed, first, whole
        self._epochs_before = epochs_before
        self.tokens_per_piece = whole.num_tokens / max(1, whole.num_pieces)

    def pieces(self, begin: int, count: int) -> Pieces:
        """The `count` pieces from the `begin`-th on."""
        first, each, parts = self._first.num_pieces, self._whole.num_pieces, []
        end = begin + count
        epochs = range(max(0, 1 + (begin - first) // each), max(1, 2 + (end - 1 - first) // each))
        for epoch in epochs:
            index, passed = (self._whole, first + (epoch - 1) * each) if epoch else (self._first, 0)
            numbers = np.arange(max(begin - passed, 0), min(end - passed, index.num_pieces))
            permutation = Permutation(index.num_pieces, self._seed, self._name, epoch)
            parts.append(index.pieces(permutation(numbers)))
        return join(parts)

    def pieces_of(self, epochs: int) -> int:
        """Pieces up to the end of so many epochs, with those of earlier runs."""
        more = epochs - self._epochs_before
        return self._first.num_pieces + (more - 1) * self._whole.num_pieces if more > 0 else 0


NO_PIECES = Pieces(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))


def join(parts: Sequence[Pieces]) -> Pieces:
    """All pieces of `parts`, one after another."""
    return Pieces(
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
    )


def _ends_in_chunks(lengths: NDArray[Any], context_tokens: int) -> Iterator[Integers]:
    total = 0
    for begin in range(0, len(lengths), _CHUNK):
        part = lengths[begin : begin + _CHUNK].astype(np.int64)
        sums = np.cumsum(-(-part // context_tokens)) + total
        total = int(sums[-1])
        yield sums
