"""The code itself, in the plainest form: whole numbers of any size, one byte at a time.

Everything else in this package is judged by this module.

**The code of a window** (EqualInfoAC[b, v] of arXiv 2404.03626, section 3.3, with a finalisation
of ours). All strings form a tree; a string's children are the string and one more byte. Every
string owns a range of the 2^b codes, [low, low + count), found from the root down:

- the empty string owns all of them;
- a string that is not empty keeps its first code, `low`, for itself: this is the code of a window
  that holds exactly this string;
- the `spare` codes that remain (all of the empty string's) go to its children in the order of their
  bytes, in proportion to M1's cumulative table C, which runs from 0 to 2^14: the child of byte x
  gets the codes from (C[x] * spare >> 14) to (C[x + 1] * spare >> 14), counted from the first spare
  one. A child whose share is empty has no code.

A window is the longest string at the beginning of the text that has a code: bytes are taken until
the next one has no code (greedy), or the document ends. M1 sees the bytes of the window alone.

**Why this is unique.** The shares of all children are consecutive and end at C[256] = 2^14, so they
add up to `spare`: the string's own code and the ranges of its children tile its range. Going down
the tree, every code therefore lies in exactly one child's range until it is some string's own code;
counts shrink with each step, so that happens. So codes and strings with a code correspond one to
one: all 2^b codes are in use, none has two strings. A decoder needs nothing but the bits. In the
paper a string shares its code with the child that lies at the same point of the number line, and
the decoder takes the longest; where text ends, or goes on with a byte that does not fit, it may
take one byte too many (99.4 % of documents came back). A code of its own costs a string one part in
`count`, and then the last window is like any other and no end symbol is needed: a document is the
list of its windows, and an empty document has none.

Every byte can be coded: the smallest frequency is 1 of 2^14, so with b >= 16 a single byte gets at
least four codes. Along the tree codes rise in the order of a walk that visits a string before
its children, so of two windows the one with the smaller code comes first in a dictionary.

**Tokens.** A code is b bits, the high ones first, cut into tokens of 8 bits (v = 256) or 16 bits
(v = 65536); v = 65536 is v = 256 with neighbours joined.

**Plain AC** codes a document as one number, with M1's full view of the text: the 32-bit coder of
Witten, Neal and Cleary (1987), whose last symbol is the end of the document, finished by two bits
and zeros up to a whole token. **Static AC** is the same with one table for all places.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megascale.arrays import Bytes, Integers
from megascale.errors import UserError
from megascale.infowindow.tables import BYTES, END, PRECISION, ByteModel, byte_tables, cumulative

WINDOW_BITS = (16, 24, 32, 64, 128)
VOCABULARIES = (256, 65536)
Table = Sequence[int] | Integers
"""A cumulative table."""
_TOP, _HALF, _QUARTER = (1 << 32) - 1, 1 << 31, 1 << 30


class Tables:
    """The byte tables of a model by context, each asked for once; up to `most` are remembered."""

    def __init__(self, model: ByteModel, most: int = 200_000) -> None:
        self._model = model
        self._most = most
        self._known: dict[bytes, array[int]] = {}

    def of(self, context: bytes) -> array[int]:
        """257 numbers from 0 to 2^14."""
        found = self._known.get(context)
        if found is None:
            found = array("H", byte_tables(self._model.weights_after([context]))[0].tolist())
            if len(self._known) < self._most:
                self._known[context] = found
        return found


def share(table: Table, byte: int, low: int, count: int, is_root: bool) -> tuple[int, int]:
    """(low, count) of the range of the child of `byte`; its count is 0 where it has no code."""
    own = 0 if is_root else 1
    begin = int(table[byte]) * (count - own) >> PRECISION
    end = int(table[byte + 1]) * (count - own) >> PRECISION
    return low + own + begin, end - begin


def encode_window(text: bytes, start: int, bits: int, tables: Tables) -> tuple[int, int]:
    """The code of the window that begins at `start`, and where the next one begins.

    Raises IndexError where the text has no byte there.
    """
    low, count, end = 0, 1 << bits, start
    while end < len(text):
        table = tables.of(text[start:end])
        below, inside = share(table, text[end], low, count, end == start)
        if not inside:
            break
        low, count, end = below, inside, end + 1
    if end == start:
        raise IndexError(f"no byte at {start}")
    return low, end


def decode_window(code: int, bits: int, tables: Tables) -> bytes:
    """The string that owns a code. Raises UserError for a number that is none."""
    if not 0 <= code < 1 << bits:
        raise UserError(f"code {code} is outside the {bits} bits of a window")
    text, low, count = b"", 0, 1 << bits
    while not text or code != low:
        table = tables.of(text)
        for byte in range(BYTES):
            below, inside = share(table, byte, low, count, not text)
            if below <= code < below + inside:
                break
        text, low, count = text + bytes([byte]), below, inside
    return text


def encode(text: bytes, bits: int, tables: Tables) -> list[int]:
    """The codes of a document's windows; none for an empty one."""
    codes, start = [], 0
    while start < len(text):
        code, start = encode_window(text, start, bits, tables)
        codes.append(code)
    return codes


def decode(codes: Iterable[int], bits: int, tables: Tables) -> bytes:
    """The document of these windows."""
    return b"".join(decode_window(code, bits, tables) for code in codes)


class ReferenceCoder:
    """The windows of a document, in bytes; slow."""

    def __init__(self, model: ByteModel, bits: int) -> None:
        self._tables = Tables(model)
        self._bits = bits

    def encode(self, texts: Sequence[bytes]) -> list[Bytes]:
        """The windows of each document."""
        return [self.encode_part(text, True)[0] for text in texts]

    def encode_part(self, text: bytes, is_end: bool) -> tuple[Bytes, int]:
        """Windows at the beginning of a text, and how many bytes they hold.

        Without `is_end` the last one is left out, since it may go on in what follows.
        """
        codes, held, start = [], 0, 0
        while start < len(text):
            code, start = encode_window(text, start, self._bits, self._tables)
            if is_end or start < len(text):
                codes.append(code)
                held = start
        return np.array(to_tokens(codes, self._bits, 256), dtype=np.uint8), held

    def decode(self, streams: Sequence[Bytes]) -> list[bytes]:
        """The documents of windows. Raises UserError for half a window."""
        return [
            decode(from_tokens(one.tolist(), self._bits, 256), self._bits, self._tables)
            for one in streams
        ]


def token_bits(bits: int, vocabulary: int) -> int:
    """Bits of a token.

    Raises UserError for window sizes and vocabularies that the code does not have, and where
    tokens would straddle windows.
    """
    if bits not in WINDOW_BITS:
        raise UserError(f"windows of {bits} bits: choose one of {', '.join(map(str, WINDOW_BITS))}")
    if vocabulary not in VOCABULARIES:
        raise UserError(f"a vocabulary of {vocabulary}: choose 256 or 65536")
    size = vocabulary.bit_length() - 1
    if bits % size:
        raise UserError(
            f"windows of {bits} bits cannot be cut into tokens of {size} bits; take a vocabulary "
            "of 256"
        )
    return size


def require_whole(num_bytes: int, bits: int) -> None:
    """Raises UserError unless a stream of so many bytes holds whole windows."""
    if num_bytes * 8 % bits:
        raise UserError(
            f"{num_bytes} bytes are no whole number of windows of {bits} bits; the stream was cut "
            "short"
        )


def to_tokens(codes: Sequence[int], bits: int, vocabulary: int) -> list[int]:
    """Codes cut into tokens, the high bits first. Raises UserError as `token_bits` does."""
    size = token_bits(bits, vocabulary)
    shifts = range(bits - size, -1, -size)
    return [code >> shift & vocabulary - 1 for code in codes for shift in shifts]


def from_tokens(tokens: Sequence[int], bits: int, vocabulary: int) -> list[int]:
    """Inverse of `to_tokens`. Raises UserError for half a window, and for what is no token."""
    size = token_bits(bits, vocabulary)
    each = bits // size
    if len(tokens) % each:
        raise UserError(
            f"{len(tokens)} tokens are no whole number of windows, which have {each} each; "
            "the stream was cut short"
        )
    codes = [0] * (len(tokens) // each)
    for i, token in enumerate(tokens):
        if not 0 <= token < vocabulary:
            raise UserError(f"token {token} is outside the vocabulary of {vocabulary}")
        codes[i // each] = codes[i // each] << size | token
    return codes


def encode_plain(text: bytes, tables: Iterable[Table], size: int = 8) -> list[int]:
    """A document as tokens of `size` bits under plain AC.

    `tables` gives the cumulative table of 257 symbols before each byte, and one more for the end.
    """
    bits: list[int] = []
    low, high, pending = 0, _TOP, 0
    for symbol, table in zip((*text, END), tables, strict=True):
        width = high - low + 1
        high = low + (width * int(table[symbol + 1]) >> PRECISION) - 1
        low = low + (width * int(table[symbol]) >> PRECISION)
        while (half := _half_of(low, high)) is not None:
            bit, taken = half
            if bit is None:
                pending += 1
            else:
                bits += [bit, *([1 - bit] * pending)]
                pending = 0
            low, high = (low - taken) * 2, (high - taken) * 2 + 1
    bit = 0 if low < _QUARTER else 1
    bits += [bit, *([1 - bit] * (pending + 1))]
    bits += [0] * (-len(bits) % size)
    return [int("".join(map(str, bits[i : i + size])), 2) for i in range(0, len(bits), size)]


def decode_plain(tokens: Sequence[int], model: ByteModel, size: int = 8) -> bytes:
    """The document of a plain AC stream. Raises UserError for one that ends too early."""
    return bytes(plain_bytes(tokens, model, size))


def plain_bytes(tokens: Sequence[int], model: ByteModel, size: int = 8) -> Iterator[int]:
    """The document of a plain AC stream byte by byte; UserError comes where it ends too early."""
    bits = (token >> shift & 1 for token in tokens for shift in range(size - 1, -1, -1))
    value, spent, text = 0, 0, b""
    for _ in range(32):
        value = value << 1 | next(bits, 0)
    low, high = 0, _TOP
    while True:
        table = cumulative(model.weights_after([text]))[0]
        width = high - low + 1
        place = ((value - low + 1 << PRECISION) - 1) // width
        symbol = int(np.searchsorted(table, place, side="right")) - 1
        high = low + (width * int(table[symbol + 1]) >> PRECISION) - 1
        low = low + (width * int(table[symbol]) >> PRECISION)
        while (half := _half_of(low, high)) is not None:
            taken, spent = half[1], spent + 1
            low, high = (low - taken) * 2, (high - taken) * 2 + 1
            value = (value - taken) * 2 + next(bits, 0)
        if symbol == END:
            return
        if spent > len(tokens) * size:
            raise UserError("the stream ends before its document does; it was cut short")
        text += bytes([symbol])
        yield symbol


def _half_of(low: int, high: int) -> tuple[int | None, int] | None:
    """(bit, what to take off) where an interval lies in the lower, upper or middle half."""
    if high < _HALF:
        return 0, 0
    if low >= _HALF:
        return 1, _HALF
    if low >= _QUARTER and high < 3 * _QUARTER:
        return None, _QUARTER
    return None


def plain_tables(text: bytes, model: ByteModel) -> Iterator[Integers]:
    """Tables (258) of the symbols of a document, each with the model's view before it."""
    for weights in model.weights_in_parts(text):
        yield from cumulative(weights)


def static_table(counts: Sequence[int]) -> Integers:
    """The one table (258) of static AC, from how often each byte and the end occur."""
    (table,) = cumulative(np.asarray([counts], dtype=np.int64))
    return np.asarray(table)


def repeated(table: Integers, length: int) -> Iterator[Integers]:
    """A static table for a document of so many bytes and its end."""
    return (table for _ in range(length + 1))


def gzip_tokens(text: bytes) -> list[int]:
    """The paper's baseline: the bytes of a zlib stream at its highest level."""
    return list(zlib.compress(text, 9))


def information(text: bytes, tables: Iterable[Table]) -> float:
    """Sum of -log2 of the tables' probabilities of a text's bytes."""
    chances = [
        int(table[byte + 1]) - int(table[byte]) for byte, table in zip(text, tables, strict=False)
    ]
    return float(len(chances) * PRECISION - np.log2(np.asarray(chances, dtype=np.float64)).sum())
