"""From weights of symbols to cumulative tables of 14 bits, in whole numbers alone.

Shape suffixes: N contexts, V symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Integers

PRECISION = 14
TOTAL = 1 << PRECISION
"""What the frequencies of a table add up to; the smallest is 1, so every byte can be coded."""
BYTES = 256
END = 256
"""The symbol after the bytes: the end of a document."""


class ByteModel(Protocol):
    """What predicts the next byte; the same context gives the same weights, always."""

    @property
    def digest(self) -> str:
        """What stands for the model: equal for models that predict equally."""

    def weights_along(self, texts: list[bytes]) -> list[Integers]:
        """For each text an array (len + 1, 257): weights of the symbol after each of its prefixes,
        the empty one first; whole numbers below 2^40."""

    def weights_in_parts(self, text: bytes) -> Iterator[Integers]:
        """The rows of `weights_along` for one text, some at a time, however long it is."""

    def weights_after(self, contexts: list[bytes]) -> Integers:
        """(N, 257): weights of the symbol after each context."""


def cumulative(weights_NV: NDArray[Any]) -> Integers:
    """Tables (N, V + 1) that begin with 0, end with 2^14 and rise by the frequency of each symbol.

    A symbol gets 1, and of the rest its part, rounded down; what is left over is the most probable
    symbol's (the first of equals).
    """
    weights = np.asarray(weights_NV, dtype=np.int64)
    symbols = weights.shape[1]
    whole = np.maximum(weights.sum(axis=1, keepdims=True), 1)
    frequencies = 1 + weights * (TOTAL - symbols) // whole
    best = weights.argmax(axis=1)
    frequencies[np.arange(len(weights)), best] += TOTAL - frequencies.sum(axis=1)
    tables = np.zeros((len(weights), symbols + 1), dtype=np.int64)
    np.cumsum(frequencies, axis=1, out=tables[:, 1:])
    return tables


def byte_tables(weights_NV: NDArray[Any]) -> Integers:
    """Tables (N, 257) of the next byte, given that the text goes on."""
    return cumulative(np.asarray(weights_NV)[:, :BYTES])
