"""Which documents stand in several parts of a blend: exact duplicates, by a hash of their ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megascale.arrays import Integers
from megascale.corpus.cache import cache_path, kept
from megascale.corpus.shards import Shard
from megascale.runtime.progress import announced

BUCKET_DOCUMENTS = 1 << 24
"""Documents that are compared at a time, about; they take a few hundred megabytes."""
FEWEST_TOKENS = 2
"""Of a document that is compared: one of its end alone says nothing."""
_CHUNK = 1 << 20
_HASHED_TOGETHER = 1 << 14
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Part:
    """Documents that are compared with those of other parts."""

    label: str
    """What to call it in progress."""
    shard: Shard
    lengths: NDArray[Any]
    """Tokens of each document of the shard; 0 for one that is not of the part."""


@dataclass(frozen=True)
class Overlap:
    """How many documents of a part stand in another; [row, column] of parts, int64[parts, parts].

    Of the diagonal: documents that repeat one before them in the same part.
    """

    documents_pp: Integers
    """Documents of the row that are in the column too."""
    tokens_pp: Integers
    """Their tokens."""
    first_pp: Integers
    """The first of them; meaningless where there is none."""


def document_digest(tokens: NDArray[Any]) -> int:
    """64 bits that stand for the ids of a document, whatever type stores them (xxh3)."""
    return xxhash.xxh3_64_intdigest(tokens.astype("<i8").tobytes())


def find_overlap(parts: Sequence[Part]) -> Overlap:
    """Compare all documents of two tokens or more, in memory that does not grow with them.

    The digests of a shard are kept beside it, so that another look at it is fast.
    """
    shape = (len(parts), len(parts))
    found = Overlap(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, _NONE))
    digests = [_digests(part) for part in parts]
    buckets = -(-sum(len(part.lengths) for part in parts) // BUCKET_DOCUMENTS)
    for bucket in announced(range(buckets), buckets, "comparing documents"):
        chosen = [
            _in_bucket(place, part, digest, bucket, buckets)
            for place, (part, digest) in enumerate(zip(parts, digests, strict=True))
        ]
        columns = [np.concatenate(column) for column in zip(*chosen, strict=True)]
        _count(found, parts, *columns)
    return found


def _digests(part: Part) -> Integers:
    """The digest of every document of the shard, as int64, memory-mapped."""
    shard, label = part.shard, f"hashing {part.label}"

    def chunks() -> Iterator[Integers]:
        count = shard.num_documents
        hashes = (document_digest(shard.read(document)) for document in range(count))
        shown = announced(hashes, count, label)
        for begin in range(0, count, _HASHED_TOGETHER):
            size = min(_HASHED_TOGETHER, count - begin)
            yield np.fromiter(shown, dtype=np.uint64, count=size).view(np.int64)

    return kept(cache_path(Path(shard.prefix), "digests"), chunks, shard.num_documents)


def _in_bucket(
    place: int, part: Part, digests: Integers, bucket: int, buckets: int
) -> tuple[NDArray[np.uint64], Integers, Integers]:
    """Digest, part and number of the documents of a part whose digest is in a bucket."""
    found = [np.empty(0, dtype=np.uint64)]
    documents = [np.empty(0, dtype=np.int64)]
    for begin in range(0, len(digests), _CHUNK):
        digest = np.asarray(digests[begin : begin + _CHUNK]).view(np.uint64)
        is_here = np.asarray(part.lengths[begin : begin + _CHUNK]) >= FEWEST_TOKENS
        if buckets > 1:
            high = digest >> np.uint64(32)
            is_here &= (high * np.uint64(buckets)) >> np.uint64(32) == bucket
        found.append(digest[is_here])
        documents.append(begin + np.flatnonzero(is_here))
    document = np.concatenate(documents)
    return np.concatenate(found), np.full(len(document), place), document


def _count(
    found: Overlap,
    parts: Sequence[Part],
    digest: NDArray[np.uint64],
    part: Integers,
    document: Integers,
) -> None:
    """Add the documents of a bucket to what was found."""
    order = np.lexsort((document, part, digest))
    digest, part, document = digest[order], part[order], document[order]
    begins = np.ones(len(digest), dtype=np.bool_)  # of a run of one digest in one part
    begins[1:] = (digest[1:] != digest[:-1]) | (part[1:] != part[:-1])
    first = np.flatnonzero(begins)
    count = np.diff(np.append(first, len(digest)))
    digest, part, document = digest[first], part[first], document[first]
    again = np.flatnonzero(count > 1)
    repeated = document[again]
    _add(found, parts, part[again], part[again], count[again] - 1, repeated)
    for step in range(1, len(parts)):
        low = np.flatnonzero(digest[step:] == digest[:-step])
        if not len(low):
            break
        for row, column in ((low, low + step), (low + step, low)):
            _add(found, parts, part[row], part[column], count[row], document[row])


def _add(
    found: Overlap,
    parts: Sequence[Part],
    row: Integers,
    column: Integers,
    count: Integers,
    document: Integers,
) -> None:
    """Add `count` documents of `row` that are in `column`; the first of each is `document`."""
    length = np.zeros(len(row), dtype=np.int64)
    for place in np.unique(row):
        mine = row == place
        length[mine] = parts[place].lengths[document[mine]]
    np.add.at(found.documents_pp, (row, column), count)
    np.add.at(found.tokens_pp, (row, column), count * length)
    np.minimum.at(found.first_pp, (row, column), document)
