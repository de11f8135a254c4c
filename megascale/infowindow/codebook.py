"""The codebook: one file that says everything about a code, and the coder that it makes.

A dictionary is kept as its tree in sorted order: of each string its length and its last byte. What
was left out are its other bytes, since the string without its last byte stands before it. Codes
without a dictionary (windows of more than 16 bits, plain AC) keep M1 instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Bytes
from megascale.errors import UserError
from megascale.infowindow.checked_files import Arrays, digest_of, read_arrays, write_arrays
from megascale.infowindow.direct import PlainCoder, WindowCoder
from megascale.infowindow.expand import CODE_BITS, NUM_CODES, Progress, expand
from megascale.infowindow.m1 import M1
from megascale.infowindow.reference import WINDOW_BITS, require_whole
from megascale.infowindow.tables import BYTES
from megascale.infowindow.walk import Tree

KIND = "megascale.infowindow.codebook"
MADE_BY = "megascale infowindow compile"
CODES = ("ac", "tunstall", "plain")
MOST_STRING_BYTES = 1 << 26
"""Of all strings of a dictionary; that of an M1 that is as sure as can be has 4 MB."""


class Coder(Protocol):
    """Documents to streams of bytes and back."""

    def encode(self, texts: Sequence[bytes]) -> list[Bytes]:
        """The stream of each document."""

    def decode(self, streams: Sequence[Bytes]) -> list[bytes]:
        """The document of each stream."""


class PartCoder(Coder, Protocol):
    """A coder that can take a document in parts."""

    def encode_part(self, text: bytes, is_end: bool) -> tuple[Bytes, int]:
        """Windows at the beginning of a text, and how many bytes they hold; without `is_end` the
        last one is left out, since it may go on in what follows."""


@dataclass(frozen=True)
class TreeCoder:
    """Windows of 16 bits, by their dictionary."""

    tree: Tree

    def encode(self, texts: Sequence[bytes]) -> list[Bytes]:
        """The windows of each document, two bytes for each."""
        return [self.encode_part(text, True)[0] for text in texts]

    def encode_part(self, text: bytes, is_end: bool) -> tuple[Bytes, int]:
        """See `PartCoder`."""
        codes, held = self.tree.encode(np.frombuffer(text, np.uint8), is_end)
        return codes.astype(">u2").view(np.uint8), held

    def decode(self, streams: Sequence[Bytes]) -> list[bytes]:
        """The documents of windows. Raises UserError for half a window."""
        return [self.tree.decode(self.codes(stream)).tobytes() for stream in streams]

    def codes(self, stream: Bytes) -> NDArray[np.uint16]:
        """The code of each window."""
        require_whole(len(stream), CODE_BITS)
        return np.ascontiguousarray(stream).view(">u2").astype(np.uint16)


@dataclass(frozen=True)
class Codebook:
    """A code: by its dictionary where it has one, else by M1."""

    facts: Mapping[str, Any]
    """code, bits (0 for plain AC), m1 (its digest); of dictionaries also what compiling found."""
    arrays: Arrays = field(repr=False)

    @staticmethod
    def compile(model: M1, code: str, bits: int, progress: Progress) -> Codebook:
        """Make the codebook of a code from M1; `progress` is told of settled codes, 2^16 in all.

        Raises UserError for a code that there is not.
        """
        _check_code(code, bits)
        facts: dict[str, Any] = {"code": code, "bits": bits, "m1": model.digest}
        if code == "plain" or bits != CODE_BITS:
            return Codebook({**facts, "shape": asdict(model.shape)}, model.arrays)
        found = expand(model, code, progress)
        facts |= {
            "m1_parameters": model.num_parameters,
            "m1_contexts": found.contexts,
            "expected_bytes": math.fsum(found.probabilities.tolist()),
            "longest": max(map(len, found.strings)),
        }
        arrays: dict[str, NDArray[Any]] = {
            "length": np.array([len(one) for one in found.strings], dtype=np.uint16),
            "last": np.array([one[-1] for one in found.strings], dtype=np.uint8),
        }
        return Codebook(facts, arrays)

    @staticmethod
    def open(path: Path) -> Codebook:
        """Read one. Raises UserError for what is not a whole codebook of this version."""
        content = read_arrays(path, KIND, MADE_BY)
        book = Codebook(content.facts, content.arrays)
        try:
            _check_code(book.code, book.bits)
            if book.is_compiled:
                assert len(book.strings) == NUM_CODES
            else:
                assert M1.of(book.arrays, book.facts["shape"], path).digest == book.facts["m1"]
        except (UserError, AssertionError, KeyError, TypeError, ValueError, IndexError):
            raise UserError(f"{path}: no code that this program knows; {MADE_BY} again") from None
        return book

    def save(self, path: Path) -> None:
        """Write it. Raises UserError where that is impossible."""
        write_arrays(path, KIND, self.arrays, self.facts)

    @property
    def code(self) -> str:
        """`ac`, `tunstall` or `plain`."""
        return str(self.facts["code"])

    @property
    def bits(self) -> int:
        """Of a window; 0 where there are none."""
        return int(self.facts["bits"])

    @property
    def is_compiled(self) -> bool:
        """Whether it has a dictionary, and M1 is not needed any more."""
        return self.bits == CODE_BITS

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return digest_of(KIND, self.arrays, self.facts)

    @cached_property
    def strings(self) -> list[bytes]:
        """What each code of a dictionary stands for.

        Raises ValueError where the tree is none, lacks a byte, or would fill the memory.
        """
        lengths, lasts = self.arrays["length"].tolist(), self.arrays["last"].tolist()
        strings: list[bytes] = []
        path: list[bytes] = [b""]
        total = 0
        for length, last in zip(lengths, lasts, strict=True):
            if not 1 <= length <= len(path):
                raise ValueError("a string without its beginning")
            total += length
            if total > MOST_STRING_BYTES:
                raise ValueError("strings that no M1 makes so long")
            path[length:] = [path[length - 1] + bytes([last])]
            strings.append(path[length])
        rises = all(a < b for a, b in zip(strings, strings[1:], strict=False))
        if not rises or sum(length == 1 for length in lengths) != BYTES:
            raise ValueError("not sorted, or a byte is missing")
        return strings

    @cached_property
    def coder(self) -> Coder:
        """What codes by it."""
        if self.is_compiled:
            return TreeCoder(Tree(self.strings))
        model = M1.of(self.arrays, self.facts["shape"], Path("codebook"))
        return PlainCoder(model) if self.code == "plain" else WindowCoder(model, self.bits)

    @property
    def windows(self) -> PartCoder:
        """The coder of windows. Raises UserError for plain AC, which has none."""
        coder = self.coder
        if isinstance(coder, PlainCoder):
            raise UserError(
                "plain AC codes a document as one number, and a file would not fit into memory; "
                "compile with --code ac or tunstall"
            )
        return coder  # type: ignore[return-value]

    def require_m1(self, model: M1, where: Path) -> None:
        """Raises UserError unless the codebook was made from this M1."""
        if model.digest != self.facts["m1"]:
            raise UserError(
                f"{where}: M1 {model.digest[:12]} is not the one that the codebook was compiled "
                f"from, {str(self.facts['m1'])[:12]}; give that one, or compile again"
            )


def _check_code(code: str, bits: int) -> None:
    if code not in CODES:
        raise UserError(f"code {code}: choose one of {', '.join(CODES)}")
    if code == "plain" and bits != 0:
        raise UserError(f"plain AC has no windows, and so none of {bits} bits; leave out --bits")
    if code == "tunstall" and bits != CODE_BITS:
        raise UserError(f"code tunstall is a dictionary of 2^{CODE_BITS}; it needs --bits 16")
    if code == "ac" and bits not in WINDOW_BITS:
        raise UserError(f"windows of {bits} bits: choose one of {', '.join(map(str, WINDOW_BITS))}")
