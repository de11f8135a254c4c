"""megatron-core's indexed shards (`.bin` / `.idx`), read and written with NumPy alone.

`.idx`: magic, version (u64), type code (u8), number of sequences (u64), number of document
bounds (u64), then int32 lengths, int64 byte offsets, int64 document bounds. `.bin`: the tokens.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Bytes
from megascale.errors import RankError, UserError
from megascale.reading import open_regular, regular_handle
from megascale.runtime.files import whole_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
MOST_TOKENS = 2**31 - 1
"""Of one document: lengths are stored as int32."""
_CHUNK = 1 << 20
TOKEN_TYPES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


class Shard:
    """One pair of files, memory-mapped; a document is all its sequences in a row."""

    def __init__(
        self, prefix: Path, dtype: np.dtype[Any], lengths: NDArray[Any], offsets: NDArray[Any]
    ) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.lengths = lengths
        """Tokens of each document."""
        self._offsets = offsets
        try:
            self._bin = regular_handle(f"{prefix}.bin")
        except OSError as error:
            raise _not_readable(prefix, error) from None

    @staticmethod
    def open(prefix: str | Path) -> Shard:
        """Open `prefix`.bin and `prefix`.idx.

        Raises UserError for files that are missing, of another format, or cut short.
        """
        prefix = Path(prefix)
        raw, dtype, num_sequences, num_bounds = _read_header(prefix)
        begin = HEADER.size
        lengths = _view(raw, np.int32, begin, num_sequences)
        offsets = _view(raw, np.int64, begin + 4 * num_sequences, num_sequences)
        bounds = _view(raw, np.int64, begin + 12 * num_sequences, num_bounds)
        one_each = num_bounds == num_sequences + 1 and _all_steps(bounds, _is_next)
        _check_bounds(prefix, num_sequences, bounds, one_each)
        _check_sequences(prefix, dtype, lengths, offsets, in_rows=not one_each)
        if one_each:  # not by their number alone: some of none and of several may count the same
            return Shard(prefix, dtype, lengths, offsets)
        totals = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[bounds]
        # a last document without sequences begins where there is no offset
        begins = np.append(offsets, 0)[bounds[:-1]]
        return Shard(prefix, dtype, np.diff(totals), begins)

    def __del__(self) -> None:
        if hasattr(self, "_bin"):
            os.close(self._bin)

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard."""
        return int(self.lengths.sum(dtype=np.int64))

    def read(self, document: int, start: int = 0, count: int | None = None) -> NDArray[Any]:
        """Tokens `start` to `start + count` of a document (to its end where `count` is None).

        Reads these bytes and no others. Raises IndexError outside the document.
        """
        length = int(self.lengths[document])
        count = length - start if count is None else count
        if start < 0 or count < 0 or start + count > length:
            raise IndexError(f"{self.prefix}: tokens {start}+{count} of document of {length}")
        width = self.dtype.itemsize
        offset = int(self._offsets[document]) + start * width
        data = os.pread(self._bin, count * width, offset)
        if len(data) != count * width:
            raise RankError(f"{self.prefix}.bin was cut short while it was read; prepare it again")
        return np.frombuffer(data, dtype=self.dtype)


def _read_header(prefix: Path) -> tuple[Bytes, np.dtype[Any], int, int]:
    try:
        with open_regular(f"{prefix}.idx") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER.size:
                raise UserError(
                    f"{prefix}.idx: {size} bytes are too few for an index; prepare again"
                )
            raw = np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise UserError(
            f"{prefix}.idx: {error.strerror}; give the prefix of a prepared shard"
        ) from None
    magic, version, code, num_sequences, num_bounds = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in TOKEN_TYPES:
        raise UserError(
            f"{prefix}.idx: not a megatron-core index of version 1 with whole-number tokens"
        )
    needed = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size == needed + num_sequences and num_sequences:
        raise UserError(
            f"{prefix}.idx: is a multimodal index of megatron-core, with a mode for each sequence; "
            "only text can be trained on: write the shard without modes"
        )
    if size != needed:
        raise UserError(
            f"{prefix}.idx: has {size} bytes where its header speaks of {needed}; it was cut "
            "short or damaged, prepare it again"
        )
    return raw, np.dtype(TOKEN_TYPES[code]), num_sequences, num_bounds


def _view(raw: Bytes, kind: Any, offset: int, count: int) -> NDArray[Any]:
    return np.frombuffer(raw, dtype=kind, count=count, offset=offset)


def _check_bounds(prefix: Path, num_sequences: int, bounds: NDArray[Any], one_each: bool) -> None:
    whole = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == num_sequences
    if not whole or not (one_each or _all_steps(bounds, np.less_equal)):
        raise UserError(f"{prefix}.idx: document bounds do not cover the sequences; prepare again")


def _all_steps(bounds: NDArray[Any], good: Callable[[NDArray[Any], NDArray[Any]], Any]) -> bool:
    """Whether `good` of each bound and the one after it; differences of forged ones overflow."""
    for begin in range(0, len(bounds) - 1, _CHUNK):
        after = bounds[begin + 1 : begin + 1 + _CHUNK]
        if not good(bounds[begin : begin + len(after)], after).all():
            return False
    return True


def _is_next(before: NDArray[Any], after: NDArray[Any]) -> Any:
    return before + 1 == after


def _not_readable(prefix: Path, error: OSError) -> UserError:
    return UserError(f"{prefix}.bin: {error.strerror}; it belongs beside {prefix}.idx")


def _check_sequences(
    prefix: Path, dtype: np.dtype[Any], lengths: NDArray[Any], offsets: NDArray[Any], in_rows: bool
) -> None:
    try:
        size = os.stat(f"{prefix}.bin").st_size
    except OSError as error:
        raise _not_readable(prefix, error) from None
    width = dtype.itemsize
    for begin in range(0, len(lengths), _CHUNK):
        size_here = lengths[begin : begin + _CHUNK].astype(np.int64) * width
        offset = offsets[begin : begin + _CHUNK]
        if size_here.min() < 0 or offset.min() < 0 or (offset > size - size_here).any():
            raise UserError(
                f"{prefix}.bin: its {size} bytes end before a sequence that its index speaks of; "
                "it was cut short or damaged, prepare it again"
            )
        following = offsets[begin + 1 : begin + 1 + _CHUNK]
        if in_rows and (following != (offset + size_here)[: len(following)]).any():
            raise UserError(f"{prefix}.idx: sequences of a document do not lie in a row")


class ShardWriter:
    """Writes documents one after another; the files appear when it is closed without error."""

    def __init__(self, prefix: str | Path, dtype: Any) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self._lengths: list[int] = []
        self._files = ExitStack()  # the last that is entered gets its name first
        self._idx = self._files.enter_context(whole_file(Path(f"{prefix}.idx")))
        self._bin = self._files.enter_context(whole_file(Path(f"{prefix}.bin")))

    def add(self, tokens: NDArray[Any]) -> None:
        """Append one document. Raises UserError for one that is too long for the format."""
        if len(tokens) > MOST_TOKENS:
            raise UserError(
                f"document {len(self._lengths)} of {self.prefix} has {len(tokens):,} tokens and "
                f"the format holds {MOST_TOKENS:,}; cut its text"
            )
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.append(len(tokens))

    def close(self) -> None:
        """Write the index and give both files their names."""
        with self._files:
            write_index(self._idx, self.dtype, np.array(self._lengths))

    def abandon(self, error: BaseException) -> None:
        """Remove what was written because of `error`."""
        self._files.__exit__(type(error), error, error.__traceback__)


@contextmanager
def writing(prefix: str | Path, dtype: Any) -> Iterator[ShardWriter]:
    """A ShardWriter that is closed at the end; after an error its files do not appear."""
    writer = ShardWriter(prefix, dtype)
    try:
        yield writer
    except BaseException as error:
        writer.abandon(error)
        raise
    writer.close()


def write_index(file: IO[bytes], dtype: np.dtype[Any], lengths: NDArray[Any]) -> None:
    """Write the `.idx` of documents of one sequence each, which lie in a row in the `.bin`."""
    code = next(code for code, kind in TOKEN_TYPES.items() if np.dtype(kind) == dtype)
    sizes = lengths.astype(np.int64) * dtype.itemsize
    offsets = np.concatenate([[0], np.cumsum(sizes)])[: len(lengths)]
    file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4").tobytes())
    file.write(offsets.astype("<i8").tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
