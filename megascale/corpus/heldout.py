"""Which part of a held-out set is scored: one choice for all evaluations, and its exact bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Integers
from megascale.corpus.cache import cache_path, digest, kept, read_numbers
from megascale.corpus.pieces import Documents, LeftIndex, PieceIndex, Pieces, joined
from megascale.corpus.shards import Shard
from megascale.corpus.shuffle import Permutation
from megascale.corpus.sources import SourceInfo
from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.corpus.tokenizers import Tokenizer

MOST_UNITS = 64
"""Documents are cut into units of at least 1 / MOST_UNITS of the budget."""
LEAST_UNIT_TOKENS = 256
"""A unit has at least so many tokens, beside which the few that its ends may lose are nothing."""
NEAR_TOKENS = 64
"""An end of a unit is moved by less than this to a place where the text is not cut."""


@dataclass(frozen=True)
class HeldoutPart:
    """The part of a held-out set that is scored."""

    spans_n3: Integers
    """Document, start and length in tokens of each stretch, in document order."""
    num_bytes: int | None
    """Bytes of the text of all stretches; None where the source does not know its bytes."""
    set_tokens: int
    """Tokens of the whole set."""
    set_documents: int
    """Documents of the whole set."""

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return int(self.spans_n3[:, 2].sum())

    @property
    def documents(self) -> int:
        """Documents of which something is scored."""
        return len(np.unique(self.spans_n3[:, 0]))

    @cached_property
    def mark(self) -> str:
        """Tells this part from every other part of the same set."""
        return _mark(self.spans_n3)

    def pieces(self, context_tokens: int) -> Pieces:
        """The stretches cut into pieces of at most `context_tokens`."""
        index = PieceIndex(self.spans_n3[:, 2], context_tokens)
        return LeftIndex(self.spans_n3, index).pieces(np.arange(index.num_pieces))

    def to_bytes(self) -> bytes:
        """For another process that knows the set; see `from_bytes`."""
        num_bytes = -1 if self.num_bytes is None else self.num_bytes
        numbers = [num_bytes, self.set_tokens, self.set_documents]
        return np.append(numbers, self.spans_n3.ravel()).astype("<i8").tobytes()

    @staticmethod
    def from_bytes(payload: bytes) -> HeldoutPart:
        """Inverse of `to_bytes`."""
        (num_bytes, *sizes), spans = np.split(np.frombuffer(payload, dtype="<i8"), [3])
        return HeldoutPart(
            spans.reshape(-1, 3), None if num_bytes < 0 else int(num_bytes), *map(int, sizes)
        )


def choose_part(info: SourceInfo, context_tokens: int, tokens: int) -> HeldoutPart:
    """What is scored of the held-out set of a source when `tokens` are asked for; see `spans_of`.

    Where the source knows its bytes, stretches begin and end where its tokenizer cuts neither a
    character nor a window, so the part may be a few tokens smaller. Counting the bytes of parts of
    documents needs the tokenizer and takes time; the result is kept beside the shard. Raises
    UserError for files that are damaged.
    """
    shard = Shard.open(info.heldout or "")
    spans_n3 = spans_of(shard, context_tokens, tokens)
    num_bytes, sizes = None, _document_bytes(info, shard)
    if sizes is not None:
        whole = shard.lengths[spans_n3[:, 0]] == spans_n3[:, 2]
        measured_n4 = _measured(spans_n3[~whole], shard, sizes, info.tokenizer or "")
        num_bytes = int(sizes[spans_n3[whole, 0]].sum() + measured_n4[:, 3].sum())
        spans_n3 = np.concatenate([spans_n3[whole], measured_n4[:, :3]])
        spans_n3 = spans_n3[np.lexsort((spans_n3[:, 1], spans_n3[:, 0]))]
    return HeldoutPart(spans_n3, num_bytes, shard.num_tokens, shard.num_documents)


def spans_of(shard: Documents, context_tokens: int, tokens: int) -> Integers:
    """Document, start and length of stretches with `tokens` tokens, or all there are: int64[n, 3].

    Documents are cut into units: whole contexts, at least 1 / MOST_UNITS of `tokens`. Units are
    taken in one fixed shuffled order until they hold `tokens`; the last one is shortened. So every
    token of the set is as likely as any other to be among them, long documents are read in
    proportion to their length, and the choice depends on no seed and no rank.
    """
    lengths = np.asarray(shard.lengths)
    if tokens >= int(lengths.sum(dtype=np.int64)):
        document = np.flatnonzero(lengths)
        whole = [document, np.zeros_like(document), lengths[document]]
        return np.stack(whole, axis=1).astype(np.int64)
    contexts = -(-max(LEAST_UNIT_TOKENS, tokens // MOST_UNITS) // context_tokens)
    index = PieceIndex.of_shard(shard, contexts * context_tokens)
    order = Permutation(index.num_pieces, 0, "heldout", 0)
    units = index.pieces(order(np.arange(min(tokens, index.num_pieces))))
    count = int(np.searchsorted(np.cumsum(units.length), tokens)) + 1
    columns_3n = np.stack([units.document, units.start, units.length])[:, :count]
    columns_3n[2, -1:] -= columns_3n[2].sum() - tokens
    in_place = np.lexsort((columns_3n[1], columns_3n[0]))
    return joined(Pieces(*columns_3n[:, in_place])).reshape(-1, 3)


def _mark(spans_n3: Integers) -> str:
    return digest(spans_n3.astype("<i8").tobytes().hex())


def _document_bytes(info: SourceInfo, shard: Shard) -> Integers | None:
    """Bytes of the text of each held-out document. Raises UserError where they are damaged."""
    if info.heldout_bytes is None:
        return None
    sizes = read_numbers(info.heldout_bytes, shard.num_documents)
    if sizes is None:
        raise UserError(f"{info.heldout_bytes} is damaged; prepare the corpus again")
    return sizes


def _measured(spans_n3: Integers, shard: Shard, sizes: Integers, corpus: str) -> Integers:
    """What `_measure` yields, int64[n, 4], kept beside the shard."""
    if not len(spans_n3):
        return np.empty((0, 4), dtype=np.int64)
    path = cache_path(Path(shard.prefix), f"heldout-{_mark(spans_n3)}")
    return kept(path, lambda: _measure(spans_n3, shard, sizes, corpus)).reshape(-1, 4)


def _measure(spans_n3: Integers, shard: Shard, sizes: Integers, corpus: str) -> Iterator[Integers]:
    """Parts of documents with their ends where text is not cut, and their bytes: int64[4] each.

    `sizes` are the bytes of all documents; `corpus` is the folder whose tokenizer made them.
    """
    from megascale.corpus.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(corpus)
    known: tuple[int, _Text] | None = None
    following = [*spans_n3[1:, :2].tolist(), [-1, 0]]
    for (document, start, length), after in zip(spans_n3.tolist(), following, strict=True):
        if known is None or known[0] != document:
            known = document, _Text(tokenizer, shard.read(document))
        text = known[1]
        begin = text.near(start, 1)
        # as many tokens as were chosen, up to the next stretch of the document
        limit = after[1] if after[0] == document else int(shard.lengths[document])
        end = text.near(min(begin + length, limit), -1)
        if begin < end:
            num_bytes = text.share(begin, end, int(sizes[document]))
            yield np.array([document, begin, end - begin, num_bytes])


class _Text:
    """The ids of one document, and which bytes of its text they are."""

    def __init__(self, tokenizer: Tokenizer, ids: NDArray[Any]) -> None:
        self._tokenizer, self._ids = tokenizer, ids
        self._texts: dict[int, str] = {}

    def near(self, place: int, step: int) -> int:
        """The first place from `place` on, in steps of 1 or -1, where text may be cut."""
        for near in range(place, place + step * NEAR_TOKENS, step):
            if not 0 < near < len(self._ids) or self._may_cut(near):
                return near
        return place

    def share(self, begin: int, end: int, num_bytes: int) -> int:
        """Bytes of the tokens from `begin` to `end`, of a document of `num_bytes`.

        Exact where the tokenizer gives the document back. One that loses or changes text does not
        say where; then all bytes of the document are shared out in proportion to the text that
        comes back, or to tokens where none does.
        """
        part, whole = self._size_of(end) - self._size_of(begin), self._size_of(len(self._ids))
        if not whole:
            part, whole = end - begin, len(self._ids)
        return round(num_bytes * part / whole)

    def _may_cut(self, place: int) -> bool:
        """Whether the token before `place` ends a character, and a window where there are some."""
        text = self._first(place)
        return not text.endswith("\ufffd") and text != self._first(place - 1)

    def _size_of(self, place: int) -> int:
        """Bytes of the text of the first `place` tokens."""
        return len(self._first(place).encode())

    def _first(self, place: int) -> str:
        """The text of the first `place` tokens."""
        if place not in self._texts:
            self._texts[place] = self._tokenizer.decode(self._ids[:place])
        return self._texts[place]
