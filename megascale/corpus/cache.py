"""Numbers that follow from a shard, kept on disk beside it and memory-mapped."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from megascale.arrays import Integers
from megascale.reading import require_regular
from megascale.runtime.files import whole_file


def cache_path(prefix: Path, kind: str) -> Path:
    """A file in the folder `cache` beside a shard, with another name when the shard changes."""
    identity = [str(prefix.name), kind]
    for ending in (".idx", ".bin"):
        with suppress(OSError):
            stat = os.stat(f"{prefix}{ending}")
            identity.append(f"{stat.st_size}/{stat.st_mtime_ns}")
    return prefix.parent / "cache" / f"{prefix.name}.{kind}-{digest(' '.join(identity))}.npy"


def digest(text: str) -> str:
    """16 hexadecimal digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def kept(path: Path, make: Callable[[], Iterator[Integers]], length: int | None = None) -> Integers:
    """The numbers that `make` yields in chunks, int64[length], memory-mapped.

    They are kept in the file `path`; where that cannot be written, in an unnamed temporary one.
    """
    numbers = read_numbers(path, length)
    if numbers is None:
        with suppress(OSError):
            _write(path, make())
        numbers = read_numbers(path, length)
    if numbers is None:
        with suppress(OSError, ValueError), tempfile.TemporaryFile() as file:
            count = sum(file.write(chunk.astype("<i8").tobytes()) for chunk in make()) // 8
            file.flush()
            numbers = np.asarray(np.memmap(file, dtype="<i8", mode="r", shape=(count,)))
    return np.concatenate([np.empty(0, np.int64), *make()]) if numbers is None else numbers


def read_numbers(path: str | Path, length: int | None = None) -> Integers | None:
    """The int64[length] of a .npy file, memory-mapped; None where there is none such."""
    try:
        require_regular(path)
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # numpy parses the header as Python, so a damaged one can raise anything
        return None
    fits = numbers.dtype == np.int64 and numbers.ndim == 1 and length in (None, len(numbers))
    return np.asarray(numbers) if fits else None


def _write(path: Path, chunks: Iterator[Integers]) -> None:
    """Write the .npy file of what `chunks` hold, whole or not at all. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as file:
        _write_header(file, 0)  # room for the real one
        count = sum(file.write(chunk.astype("<i8").tobytes()) for chunk in chunks) // 8
        file.seek(0)
        _write_header(file, count)


def _write_header(file: IO[bytes], count: int) -> None:
    """NumPy leaves room in a header for its first axis to grow."""
    header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
