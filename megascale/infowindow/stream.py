"""Files of windows: any file to one and back, in bounded memory.

A header says what wrote it and how much follows, so that a stream that was cut short, changed, or
belongs to another codebook is refused: magic, version (u16), bits of a window (u16), bytes of the
text (u64), windows (u64), SHA-256 of the codebook, xxh3-128 of the text. Then the windows, a whole
number of bytes each, high bits first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megascale.errors import UserError
from megascale.infowindow.checked_files import output_file
from megascale.infowindow.codebook import Codebook, PartCoder
from megascale.runtime.outputs import begins_with

MAGIC = b"EQINFOWN"
CODED = begins_with("a file of megascale infowindow encode", MAGIC)
VERSION = 1
HEADER = struct.Struct("<8sHHQQ32s16s")
_CHUNK_BYTES, _CHUNK_WINDOWS = 1 << 17, 1 << 14
"""Taken at a time: some milliseconds with a dictionary; where M1 is asked, a minute to a
quarter of an hour, by its size."""

Progress = Callable[[int], object]
"""Told how many more bytes of the input are done."""


@dataclass(frozen=True)
class Sizes:
    """What a stream holds."""

    text_bytes: int
    windows: int
    stream_bytes: int


def encode_file(
    source: Path, target: Path, book: Codebook, coder: PartCoder, progress: Progress
) -> Sizes:
    """Code a file as one document with `coder`, which does what `book` says.

    `target` appears whole or not at all. Raises UserError for files that cannot be read or written.
    """
    import xxhash

    checksum, text_bytes, stream_bytes, rest = xxhash.xxh3_128(), 0, 0, b""
    with _files(source, target) as (read, write):
        write.write(bytes(HEADER.size))
        chunk = read.read(_CHUNK_BYTES)
        while chunk or rest:
            following = read.read(_CHUNK_BYTES)
            checksum.update(chunk)
            text_bytes += len(chunk)
            text = rest + chunk
            stream, held = coder.encode_part(text, is_end=not following)
            write.write(stream.tobytes())
            stream_bytes += len(stream)
            rest = text[held:]
            progress(len(chunk))
            chunk = following
        windows = stream_bytes * 8 // book.bits
        write.seek(0)
        digest = bytes.fromhex(book.digest)
        sizes = (text_bytes, windows, digest, checksum.digest())
        write.write(HEADER.pack(MAGIC, VERSION, book.bits, *sizes))
    return Sizes(text_bytes, windows, stream_bytes)


def decode_file(source: Path, target: Path, book: Codebook, progress: Progress) -> Sizes:
    """Inverse of `encode_file`; `target` appears only once its checksum is right.

    Raises UserError for a stream that is none, is of another codebook, or was cut short or changed.
    """
    import xxhash

    checksum, text_bytes = xxhash.xxh3_128(), 0
    with _files(source, target) as (read, write):
        expected_bytes, windows, expected = _header(source, read.read(HEADER.size), book)
        size = book.bits // 8
        left = windows * size
        while left and (raw := read.read(min(left, _CHUNK_WINDOWS * size))):
            left -= len(raw)
            stream = np.frombuffer(raw[: len(raw) // size * size], np.uint8)
            (text,) = book.windows.decode([stream])
            checksum.update(text)
            text_bytes += len(text)
            write.write(text)
            progress(len(raw))
        if left or read.read(1):
            there = f"{left:,} bytes of windows are missing" if left else "more than its windows"
            raise UserError(f"{source}: {there}; it was cut short or changed")
        if text_bytes != expected_bytes or checksum.digest() != expected:
            raise UserError(f"{source}: does not decode to the text it was made of; it was changed")
    return Sizes(text_bytes, windows, windows * size)


def _header(source: Path, raw: bytes, book: Codebook) -> tuple[int, int, bytes]:
    """(bytes of the text, windows, checksum of the text) of a stream of this codebook."""
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise UserError(f"{source}: not a file that megascale infowindow encode wrote")
    _, version, bits, text_bytes, windows, digest, checksum = HEADER.unpack(raw)
    if version != VERSION:
        raise UserError(
            f"{source}: coded by version {version}, this program reads version {VERSION}"
        )
    if digest.hex() != book.digest:
        raise UserError(
            f"{source}: coded by codebook {digest.hex()[:12]}, and this one is "
            f"{book.digest[:12]}; give the one that coded it"
        )
    if bits != book.bits:
        raise UserError(f"{source}: speaks of windows of {bits} bits; it was changed")
    return text_bytes, windows, checksum


@contextmanager
def _files(source: Path, target: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The input, and an output that gets its name when the block ends well."""
    try:
        read = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; give another file") from None
    with read, output_file(target) as write:
        yield read, write
