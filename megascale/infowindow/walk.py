"""The compiled coder: a walk over the dictionary's tree, one small table lookup per byte.

The tree is a double array (Aoe 1989): a string stands for the place of its entry, and its children
lie at `base + byte`, where no two strings have the same base, so that an entry needs no more than
its byte to say whose child it is. An entry is 31 bits: base above, byte (or 256: nobody's) in the
lowest nine. A dictionary of 2^16 strings takes a quarter of a megabyte, which stays in a core's
cache; a plain table of next states would take 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Bytes, Integers
from megascale.infowindow.tables import BYTES

_LABEL_BITS = 9
_NOBODY = 256
_BLOCK = 16
"""Bytes that decoding copies at once; see `loops.unfold`."""

Codes = NDArray[np.uint16]


@dataclass(frozen=True)
class Tree:
    """A dictionary as decoder and encoder want it."""

    strings: Sequence[bytes] = field(repr=False)
    """Sorted; closed under prefixes."""

    @cached_property
    def lengths(self) -> Integers:
        """Bytes of each string."""
        return np.array([len(one) for one in self.strings], dtype=np.int64)

    @cached_property
    def _double_array(self) -> tuple[NDArray[np.int32], Codes]:
        """Entries, and the code of the string at each place."""
        from megascale.infowindow import loops

        place_of = {string: i for i, string in enumerate(self.strings)}
        parent = np.array([place_of.get(one[:-1], -1) for one in self.strings], dtype=np.int64)
        byte = np.array([one[-1] for one in self.strings], dtype=np.int64)
        order = np.argsort(parent, kind="stable")
        owners, first, count = np.unique(parent[order], return_index=True, return_counts=True)
        # the root first, then the largest families, which fit into the fewest gaps
        by_size = sorted(range(len(owners)), key=lambda i: (owners[i] >= 0, -count[i], first[i]))
        families = np.array([[first[i], count[i]] for i in by_size], dtype=np.int64)
        # Enough for any tree: families of more than 32 are fewer than 2^11, and each fits into 512
        # places behind all others; what is taken keeps a smaller one from 33 * 2^16 bases at most.
        bases = loops.arrange(families, byte[order], np.zeros(1 << 22, np.bool_))
        end = int(bases.max()) + BYTES
        base_of = np.full(len(self.strings), end, dtype=np.int64)
        inner = owners[by_size] >= 0
        base_of[owners[by_size][inner]] = bases[inner]
        base_of_parent = np.zeros(len(self.strings), dtype=np.int64)
        base_of_parent[parent >= 0] = base_of[parent[parent >= 0]]
        entries = np.full(end + BYTES, _NOBODY, dtype=np.int32)
        codes = np.zeros(end + BYTES, dtype=np.uint16)
        places = base_of_parent + byte
        entries[places] = base_of << _LABEL_BITS | byte
        codes[places] = np.arange(len(self.strings))
        return entries, codes

    @cached_property
    def _line(self) -> tuple[NDArray[np.uint32], NDArray[np.uint16], Bytes]:
        """Where each string begins in a line of bytes, its length, and the line.

        A string lies where the next one does that begins with it, so that the line is short.
        """
        begins, parts, begin, end = np.zeros(len(self.strings), dtype=np.uint32), [], 0, 0
        following = b""
        for i in range(len(self.strings) - 1, -1, -1):
            one = self.strings[i]
            if not following.startswith(one):
                begin, end = end, end + len(one)
                parts.append(one)
            begins[i] = begin
            following = one
        line = np.frombuffer(b"".join([*parts, bytes(_BLOCK)]), dtype=np.uint8)
        return begins, self.lengths.astype(np.uint16), line

    def encode(self, text: Bytes, is_end: bool = True) -> tuple[Codes, int]:
        """Codes of the windows of a text, and how many bytes they hold.

        Without `is_end` the last window is left out, since it may go on in what follows.
        """
        from megascale.infowindow import loops

        entries, codes = self._double_array
        out = np.empty(len(text), dtype=np.uint16)
        count, held = loops.walk(text, entries, codes, out, is_end)
        return out[:count], held

    def decode(self, codes: NDArray[np.integer[Any]]) -> Bytes:
        """The bytes of windows; numbers that are no codes are left out."""
        from megascale.infowindow import loops

        return loops.unfold(codes, *self._line)
