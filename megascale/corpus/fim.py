"""Fill-in-the-middle: blocks of documents that are read as prefix, suffix and then middle.

Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022,
arXiv 2207.14255), at the level of tokens and of the context.

A document is cut into blocks that have at most `block_tokens` tokens as they are read. A hash of
the numbers of document and block decides how a block is read, so nothing is stored and the order
of reading does not matter. A block that is transformed has three tokens more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Integers
from megascale.config.schema import FillInMiddleConfig
from megascale.corpus.shards import Shard
from megascale.corpus.shuffle import mix

SENTINELS = 3
FEWEST_TOKENS = 8
"""Shorter blocks are read as they are."""
_COIN, _ORDER, _FIRST_CUT, _SECOND_CUT = range(4)
"""What a hash of a block decides."""
_GAMMA = np.arange(4, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment, because it maps 0 to 0."""


class Sentinels(NamedTuple):
    """Ids of the tokens that stand before the three parts of a block."""

    prefix: int
    suffix: int
    middle: int

    @staticmethod
    def of(fim: FillInMiddleConfig) -> Sentinels:
        """Those of a finalized config."""
        assert fim.prefix_id is not None and fim.suffix_id is not None
        assert fim.middle_id is not None
        return Sentinels(fim.prefix_id, fim.suffix_id, fim.middle_id)


@dataclass(frozen=True)
class BlockRule:
    """How documents of one source are cut into blocks and which of these are transformed."""

    rate: float
    """Share of the blocks that are transformed."""
    spm: float
    """Share of these that have the suffix first; see `FillInMiddleConfig.spm`."""
    block_tokens: int
    """Most tokens of a block, with its sentinels."""

    @staticmethod
    def of(fim: FillInMiddleConfig) -> BlockRule:
        """The rule of a finalized config."""
        assert fim.block_tokens is not None
        return BlockRule(fim.rate, fim.spm, fim.block_tokens)

    @property
    def mark(self) -> str:
        """Stands for the rule in names of files, and for what a source holds."""
        return f"fim-{self.rate!r}-{self.spm!r}-{self.block_tokens}"

    def lengths(self, stored: NDArray[Any], first: int = 0) -> Integers:
        """Tokens that are read of documents `first`, `first` + 1, ... of `stored` tokens, int64."""
        stored = np.asarray(stored, dtype=np.int64)
        added, document, left, block = np.zeros_like(stored), np.arange(len(stored)), stored, 0
        while len(document):
            changed = self._is_changed(first + document, np.full_like(document, block), left)
            added[document] += SENTINELS * changed
            left = left - (self.block_tokens - SENTINELS * changed)
            going = np.flatnonzero(left > 0)
            document, left, block = document[going], left[going], block + 1
        added += stored
        return added

    def _is_changed(self, document: Integers, block: Integers, left: Integers) -> Any:
        """Whether blocks are transformed, where `left` stored tokens are left from each on."""
        coins = _uniform(document, block, _COIN) < self.rate
        return coins & (left >= FEWEST_TOKENS)

    def blocks(self, document: int, stored: int) -> Iterator[tuple[int, int, bool]]:
        """(first stored token, stored tokens, whether it is transformed) of each block."""
        count = -(-stored // (self.block_tokens - SENTINELS))  # if all are transformed
        coins = _uniform(np.full(count, document), np.arange(count), _COIN) < self.rate
        begin = 0
        for coin in coins.tolist():
            left = stored - begin
            if left <= 0:
                return
            changed = coin and left >= FEWEST_TOKENS
            tokens = min(left, self.block_tokens - SENTINELS * changed)
            yield begin, tokens, changed
            begin += tokens


class Part(NamedTuple):
    """A stretch of a document as it is read: stored tokens, or one sentinel."""

    begin: int
    tokens: int
    sentinel: int | None = None


class FimReader:
    """A shard whose documents are read as `rule` says; reads like `Shard`."""

    def __init__(self, shard: Shard, rule: BlockRule, sentinels: Sentinels, eod_id: int) -> None:
        self.shard, self.rule, self.sentinels, self.eod_id = shard, rule, sentinels, eod_id

    @property
    def prefix(self) -> Path:
        """That of the shard."""
        return self.shard.prefix

    @property
    def lengths(self) -> NDArray[Any]:
        """Stored tokens of each document, without sentinels: what `GlobalBatches` asks for."""
        return self.shard.lengths

    def read(self, document: int, start: int, count: int) -> NDArray[Any]:
        """Tokens `start` to `start + count` of a document as it is read, int64[count].

        Raises IndexError outside the document.
        """
        end, at = start + count, 0
        found = [np.empty(0, dtype=np.int64)]
        for part in self._parts(document, start // self.rule.block_tokens):
            begin, stop = max(start, at), min(end, at + part.tokens)
            if begin < stop:
                found.append(self._tokens(document, part, begin - at, stop - begin))
            at += part.tokens
            if at >= end:
                break
        if start < 0 or count < 0 or at < end:
            raise IndexError(f"{self.prefix}: tokens {start}+{count} of document {document}")
        return np.concatenate(found)

    def _tokens(self, document: int, part: Part, skipped: int, count: int) -> NDArray[Any]:
        if part.sentinel is not None:
            return np.array([part.sentinel], dtype=np.int64)
        return self.shard.read(document, part.begin + skipped, count).astype(np.int64)

    def _parts(self, document: int, first_block: int) -> Iterator[Part]:
        """The stretches of a document in the order in which they are read.

        Blocks before `first_block` may come as one stretch of the right length.
        """
        stored = int(self.shard.lengths[document])
        for block, (begin, tokens, changed) in enumerate(self.rule.blocks(document, stored)):
            if not changed or block < first_block:
                yield Part(begin, tokens + SENTINELS * changed)
            else:
                yield from self._transformed(document, block, begin, tokens, stored)

    def _transformed(
        self, document: int, block: int, begin: int, tokens: int, stored: int
    ) -> Iterator[Part]:
        """The stretches of a block; the token that ends a document stays its last."""
        end = begin + tokens
        is_ended = end == stored and int(self.shard.read(document, end - 1, 1)[0]) == self.eod_id
        body = tokens - is_ended
        number = np.array([document]), np.array([block])
        cuts = sorted(
            int(_uniform(*number, which)[0] * (body + 1)) for which in (_FIRST_CUT, _SECOND_CUT)
        )
        prefix = Part(begin, cuts[0])
        middle = Part(begin + cuts[0], cuts[1] - cuts[0])
        suffix = Part(begin + cuts[1], body - cuts[1])
        marks = [Part(begin, 1, sentinel) for sentinel in self.sentinels]
        if _uniform(*number, _ORDER)[0] < self.rule.spm:
            yield from (marks[0], marks[1], suffix, marks[2], prefix, middle)
        else:
            yield from (marks[0], prefix, marks[1], suffix, marks[2], middle)
        if is_ended:
            yield Part(end - 1, 1)


def _uniform(document: Integers, block: Integers, which: int) -> NDArray[np.float64]:
    """Numbers from 0 to below 1 that follow from the arguments, float64 of their shape."""
    seeds = mix(np.asarray(document).astype(np.uint64) * np.uint64(4) + _GAMMA[which])
    hashes = mix(seeds + np.asarray(block).astype(np.uint64))
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
