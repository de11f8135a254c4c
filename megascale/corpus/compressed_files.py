"""Files of text as they are found: compressed or not, told by their first bytes and not by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megascale.errors import UserError
from megascale.reading import open_regular

HEAD_BYTES = 16
"""By which a file's format is told."""
_TAR_MARK = slice(257, 262)
_UTF8_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20


def _zstd(raw: BinaryIO) -> BinaryIO:
    """Of one or several frames. Raises OSError where the last one is cut short."""
    import pyarrow as pa

    stream: Any = pa.CompressedInputStream(raw, "zstd")
    return cast(BinaryIO, io.BufferedReader(stream, _BUFFER_BYTES))


_COMPRESSIONS: dict[str, tuple[re.Pattern[bytes], Callable[[BinaryIO], Any]]] = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), lambda raw: gzip.GzipFile(fileobj=raw)),
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd),
    "bzip2": (re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"), bz2.BZ2File),
    "xz": (re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
}
"""Name to (first bytes, how to open). Sources: RFC 1952, RFC 8878, and the formats of bzip2, xz."""
_ENDINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_TO_UTF8 = "convert it to UTF-8, e.g. with iconv"
_OTHERS = {
    b"PAR1": "a Parquet file; read it with kind: parquet",
    b"ARROW1": "an Arrow file; write it as Parquet and read it with kind: parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; give the folder of save_to_disk with kind: dataset",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x00\x00\xfe\xff": f"UTF-32; {_TO_UTF8}",
    b"\xff\xfe\x00\x00": f"UTF-32; {_TO_UTF8}",
    b"\xff\xfe": f"UTF-16; {_TO_UTF8}",
    b"\xfe\xff": f"UTF-16; {_TO_UTF8}",
}
"""First bytes to what a file is and what would work."""


@contextmanager
def reading(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content of a file, unpacked and without a UTF-8 mark, and the file itself.

    Raises UserError where it cannot be read or unpacked.
    """
    try:
        with open_regular(path) as raw:
            content = _buffered(_unpacked(path, raw))
            if _is_tar(content):
                raise UserError(f"{path}: is a tar archive; unpack it")
            yield _without_mark(content), raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: {reason}; mend it or name it in exclude") from None


def _unpacked(path: str, raw: BinaryIO) -> BinaryIO:
    head = raw.read(HEAD_BYTES)
    raw.seek(0)
    compression = compression_of(head)
    if compression is not None:
        return cast(BinaryIO, _COMPRESSIONS[compression][1](raw))
    promised = _ENDINGS.get(Path(path).suffix.lower())
    if promised is not None and head:
        raise UserError(
            f"{path}: its content is not {promised}, as its ending says; rename it, mend it or "
            "name it in exclude"
        )
    return raw


def _buffered(content: BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(cast(Any, content), _BUFFER_BYTES)


def _is_tar(content: io.BufferedReader) -> bool:
    """By the mark in the header of the first file, as POSIX and GNU tar write it."""
    return content.peek(_TAR_MARK.stop)[_TAR_MARK] == b"ustar"


def _without_mark(content: io.BufferedReader) -> BinaryIO:
    if content.peek(3)[:3] == _UTF8_MARK:
        content.read(3)
    return cast(BinaryIO, content)


def compression_of(head: bytes) -> str | None:
    """How a file is compressed, by its first bytes; None: it is not."""
    fits = (name for name, (pattern, _) in _COMPRESSIONS.items() if pattern.match(head))
    return next(fits, None)


def other_format(head: bytes) -> str | None:
    """What a file is, and what to do with it, by its first bytes; None where they show nothing."""
    known = next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)
    if known is None and b"\0" in head[:4]:
        return f"UTF-16, UTF-32 or no text; {_TO_UTF8}"
    return known
