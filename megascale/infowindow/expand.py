"""From M1 to the whole dictionary of a window code of 16 bits, by running M1 in large batches.

Both codes are the same kind of thing: 2^16 strings that are closed under prefixes (a string without
its last byte is in the dictionary too, or empty) and hold every single byte. A window is the
longest string of the dictionary at the beginning of the text, its code the string's place in sorted
order.

`ac`: the strings that have a code in `reference`, where their order is that of the codes.

`tunstall`: the 2^16 most probable strings, of equally probable ones the first in sorted order. The
greedy walk passes through a string with the string's probability, so the expected bytes of a window
are the sum of the probabilities of all strings in the dictionary: no other dictionary of its size
that is closed under prefixes has more (as in Tunstall 1967, with a code for inner strings too, so
that any text can end anywhere).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megascale.arrays import Floats
from megascale.infowindow.tables import BYTES, PRECISION, TOTAL, ByteModel, byte_tables

CODE_BITS = 16
NUM_CODES = 1 << CODE_BITS
_BATCH = 2048

Progress = Callable[[int], object]
"""Told how many more of the 2^16 codes are settled."""


@dataclass(frozen=True)
class Expansion:
    """The strings of a dictionary in sorted order, and what it took to find them."""

    strings: list[bytes]
    probabilities: Floats
    """By M1's tables, of the string at the beginning of a window."""
    contexts: int
    """Strings after which M1 was asked."""


def expand(model: ByteModel, code: str, progress: Progress) -> Expansion:
    """The dictionary of `code`, which is `ac` or `tunstall`."""
    found, contexts = {"ac": _expand_ac, "tunstall": _expand_tunstall}[code](model, progress)
    strings = sorted(found)
    probabilities = np.array([found[one] for one in strings])
    return Expansion(strings, probabilities, contexts)


def _expand_ac(model: ByteModel, progress: Progress) -> tuple[dict[bytes, float], int]:
    """Level by level: the ranges of `reference`, for many strings at a time."""
    found: dict[bytes, float] = {}
    waiting: list[tuple[bytes, float, int]] = [(b"", 1.0, NUM_CODES)]
    contexts = 0
    while waiting:
        batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
        contexts += len(batch)
        tables = byte_tables(model.weights_after([text for text, _, _ in batch]))
        spare = np.array([count - bool(text) for text, _, count in batch])
        counts = np.diff(tables * spare[:, None] >> PRECISION, axis=1)
        chances = np.diff(tables, axis=1) / TOTAL
        settled = 0
        for row, byte in zip(*map(np.ndarray.tolist, counts.nonzero()), strict=True):
            text, chance, _ = batch[row]
            child, count = text + bytes([byte]), int(counts[row, byte])
            found[child] = chance * float(chances[row, byte])
            settled += 1
            if count > 1:
                waiting.append((child, found[child], count))
        progress(settled)
    return found, contexts


def _expand_tunstall(model: ByteModel, progress: Progress) -> tuple[dict[bytes, float], int]:
    """The most probable strings first, as long as one could still have a child in the dictionary.

    A child is less probable than its parent, so once every string above the least probable one of
    the dictionary has been expanded, no string outside is as probable. Equal strings are all kept
    until the end, so that the order in which they are found decides nothing.
    """
    chances = np.diff(byte_tables(model.weights_after([b""])), axis=1)[0] / TOTAL
    found = {bytes([byte]): float(chances[byte]) for byte in range(BYTES)}
    waiting, contexts, settled = list(found), 1, 0
    while waiting:
        floor = _floor(found)
        waiting = sorted((s for s in waiting if found[s] > floor), key=lambda s: (-found[s], s))
        batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
        contexts += len(batch)
        step = min(len(batch), NUM_CODES - settled)  # a few turn out to have been for nothing
        settled += step
        progress(step)
        tables = byte_tables(model.weights_after(batch)) if batch else np.empty((0, BYTES + 1))
        chances = np.array([found[s] for s in batch])[:, None] * (np.diff(tables, axis=1) / TOTAL)
        for row, byte in zip(*map(np.ndarray.tolist, (chances >= floor).nonzero()), strict=True):
            child = batch[row] + bytes([byte])
            found[child] = float(chances[row, byte])
            waiting.append(child)
    progress(NUM_CODES - settled)
    single = [bytes([byte]) for byte in range(BYTES)]
    others = sorted((s for s in found if len(s) > 1), key=lambda s: (-found[s], s))
    chosen = [*single, *others[: NUM_CODES - BYTES]]
    return {s: found[s] for s in chosen}, contexts


def _floor(found: dict[bytes, float]) -> float:
    """Probability of the last string of the dictionary so far: a string outside that is as probable
    may come before it in sorted order. 0 while there is room."""
    longer = [chance for string, chance in found.items() if len(string) > 1]
    if len(longer) < NUM_CODES - BYTES:
        return 0.0
    return float(np.partition(longer, -(NUM_CODES - BYTES))[-(NUM_CODES - BYTES)])
