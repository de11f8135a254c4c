"""Coders that ask M1 while they code: windows too large for a dictionary, and plain AC.

They do what `reference` says, for many documents (to encode) or windows (to decode) at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from megascale.arrays import Bytes, Integers
from megascale.errors import UserError
from megascale.infowindow import reference
from megascale.infowindow.reference import require_whole, share
from megascale.infowindow.tables import PRECISION, ByteModel, byte_tables

_WINDOWS_AT_ONCE = 1024


@dataclass
class _Walk:
    """A document on its way through the windows."""

    text: bytes
    is_end: bool
    start: int
    look: int
    """Bytes of the text that M1 is shown next."""
    codes: list[int]

    @property
    def shown(self) -> bytes:
        """What M1 is asked about."""
        return self.text[self.start : self.start + self.look]


@dataclass(frozen=True)
class WindowCoder:
    """Windows of `bits` bits, coded by M1 itself."""

    model: ByteModel
    bits: int

    @property
    def _look(self) -> int:
        """Bytes that most windows do not exceed, as those of a good M1 take 2 bits or so each."""
        return self.bits * 5 // 8

    def encode(self, texts: Sequence[bytes]) -> list[Bytes]:
        """The windows of each document, in bytes."""
        return [_pack(codes, self.bits) for codes, _ in self._encode(texts, True)]

    def encode_part(self, text: bytes, is_end: bool) -> tuple[Bytes, int]:
        """Windows at the beginning of a text, and how many bytes they hold.

        Without `is_end` the last window is left out, since it may go on in what follows.
        """
        ((codes, held),) = self._encode([text], is_end)
        return _pack(codes, self.bits), held

    def _encode(self, texts: Sequence[bytes], is_end: bool) -> list[tuple[list[int], int]]:
        walks = [_Walk(text, is_end, 0, self._look, []) for text in texts]
        active = [walk for walk in walks if walk.text]
        while active:
            weights = self.model.weights_along([walk.shown for walk in active])
            active = [
                walk
                for walk, one in zip(active, weights, strict=True)
                if self._take_window(walk, byte_tables(one))
            ]
        return [(walk.codes, walk.start) for walk in walks]

    def _take_window(self, walk: _Walk, tables: Integers) -> bool:
        """Take the next window, or see that more of the text must be shown; whether to go on."""
        shown = walk.shown
        low, count, length = 0, 1 << self.bits, 0
        for table, byte in zip(tables, shown, strict=False):
            below, inside = share(table, byte, low, count, length == 0)
            if not inside:
                break
            low, count, length = below, inside, length + 1
        if length == len(shown):  # the window may go on
            if walk.start + length < len(walk.text):
                walk.look *= 2
                return True
            if not walk.is_end:
                return False
        walk.codes.append(low)
        walk.start, walk.look = walk.start + length, self._look
        return walk.start < len(walk.text)

    def decode(self, streams: Sequence[Bytes]) -> list[bytes]:
        """The documents of windows. Raises UserError for a part of a window."""
        codes = [_unpack(stream, self.bits) for stream in streams]
        flat = [code for one in codes for code in one]
        texts: list[bytes] = []
        for begin in range(0, len(flat), _WINDOWS_AT_ONCE):
            texts += self._decode(flat[begin : begin + _WINDOWS_AT_ONCE])
        ends = np.cumsum([0, *map(len, codes)])
        return [b"".join(texts[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def _decode(self, codes: list[int]) -> list[bytes]:
        """The strings of codes, all of them a byte further with each pass of M1."""
        texts = [b""] * len(codes)
        ranges = [(0, 1 << self.bits)] * len(codes)
        active = list(range(len(codes)))
        while active:
            tables = byte_tables(self.model.weights_after([texts[i] for i in active]))
            for i, table in zip(active, tables, strict=True):
                byte = _find(table, codes[i], *ranges[i], is_root=not texts[i])
                ranges[i] = share(table, byte, *ranges[i], is_root=not texts[i])
                texts[i] += bytes([byte])
            active = [i for i in active if codes[i] != ranges[i][0]]
        return texts


def _find(table: Integers, code: int, low: int, count: int, is_root: bool) -> int:
    """The byte whose child's range holds `code`: the first whose range ends behind it."""
    own = 0 if is_root else 1
    past = (code - low - own + 1) << PRECISION
    return int(np.searchsorted(table, -(-past // (count - own)))) - 1


def _pack(codes: Sequence[int], bits: int) -> Bytes:
    return np.frombuffer(b"".join(code.to_bytes(bits // 8, "big") for code in codes), np.uint8)


def _unpack(stream: Bytes, bits: int) -> list[int]:
    """Codes of windows."""
    require_whole(len(stream), bits)
    raw, size = stream.tobytes(), bits // 8
    return [int.from_bytes(raw[i : i + size], "big") for i in range(0, len(raw), size)]


@dataclass(frozen=True)
class PlainCoder:
    """Plain AC over the whole document, in whole pairs of bytes."""

    model: ByteModel

    def encode(self, texts: Sequence[bytes]) -> list[Bytes]:
        """Each document as a stream of its own."""
        return [
            np.array(
                reference.encode_plain(text, reference.plain_tables(text, self.model), 16), ">u2"
            ).view(np.uint8)
            for text in texts
        ]

    def decode(self, streams: Sequence[Bytes]) -> list[bytes]:
        """The documents. Raises UserError for a stream that was cut short."""
        return [reference.decode_plain(stream.tolist(), self.model) for stream in streams]

    def decode_beginning(self, stream: Bytes) -> bytes:
        """What there is of the document of a stream that may have been cut short."""
        text = bytearray()
        with suppress(UserError):
            for byte in reference.plain_bytes(stream.tolist(), self.model):
                text.append(byte)
        return bytes(text)
