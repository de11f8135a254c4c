"""Documents to tokens, in batches and many processes; what becomes of each is decided later."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from megascale.corpus.inputs import Table, read_document
from megascale.corpus.tokenizers import Tokenizer, open_tokenizer, token_dtype

GOOD, EMPTY, INVALID = 0, 1, 2
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Encoder:
    """What a process needs to tokenize; small, for it is sent to each."""

    kind: str
    folder: str
    eod_id: int
    min_characters: int

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once per process."""
        return _open_once(self.kind, self.folder, self.eod_id)


@functools.cache
def _open_once(kind: str, folder: str, eod_id: int) -> Tokenizer:
    return open_tokenizer(kind, Path(folder), eod_id)


def text_of(raw: bytes, min_characters: int) -> tuple[int, str]:
    """Whether a document is GOOD, EMPTY or INVALID, and its text where it is good."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return INVALID, ""
    return (GOOD, text) if len(text.strip()) >= min_characters else (EMPTY, "")


def hash_of(raw: bytes) -> tuple[int, int]:
    """128 bits that stand for a text, as two whole numbers."""
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def encode_rows(
    table: Table, rows: range, encoder: Encoder, processes: int, out: Path, label: str
) -> tuple[str, ...]:
    """Tokenize a contiguous range of rows; returns the Arrow files, in order of the rows.

    Columns: verdict int8 (GOOD, EMPTY, INVALID), high and low uint64 (hash of the text), bytes
    int64 (of UTF-8), tokens (bytes of the ids, the end of the document included).
    """
    if not len(rows):
        return ()
    processes = min(processes, -(-len(rows) // _BATCH_DOCUMENTS))
    dataset = table.open()
    with _interruptible():
        done = (
            dataset.select(rows)
            .with_format("arrow")
            .map(
                _encode_batch,
                batched=True,
                batch_size=_BATCH_DOCUMENTS,
                writer_batch_size=_BATCH_DOCUMENTS,
                with_indices=True,
                fn_kwargs={"table": table, "first_row": rows.start, "encoder": encoder},
                features=_features(),
                remove_columns=dataset.column_names,
                num_proc=processes if processes > 1 else None,
                cache_file_name=str(out),
                load_from_cache_file=False,
                new_fingerprint=hashlib.blake2b(str(out).encode(), digest_size=8).hexdigest(),
                desc=label,
            )
        )
    return tuple(entry["filename"] for entry in done.cache_files)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, which every process of the terminal gets, is for this one; it ends the others.

    `datasets` answers it with the tracebacks of all, and with an error of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal arrives and no handler can be set
        return
    here, interrupted = os.getpid(), False

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if os.getpid() == here:
            interrupted = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, answer)
    try:
        yield
    except Exception:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _features() -> Any:
    from datasets import Features, Value

    kinds = {"verdict": "int8", "high": "uint64", "low": "uint64", "bytes": "int64"}
    return Features(
        {name: Value(kind) for name, kind in (kinds | {"tokens": "large_binary"}).items()}
    )


def _encode_batch(
    batch: Any, indices: list[int], table: Table, first_row: int, encoder: Encoder
) -> Any:
    import pyarrow as pa

    values = batch.column(table.column).cast("large_binary").to_pylist()
    raws = [
        read_document(table, first_row + i, value or b"")
        for i, value in zip(indices, values, strict=True)
    ]
    judged = [text_of(raw, encoder.min_characters) for raw in raws]
    hashes = [hash_of(raw) for raw in raws]
    return pa.table(
        {
            "verdict": pa.array([verdict for verdict, _ in judged], pa.int8()),
            "high": pa.array([high for high, _ in hashes], pa.uint64()),
            "low": pa.array([low for _, low in hashes], pa.uint64()),
            "bytes": pa.array([len(raw) for raw in raws], pa.int64()),
            "tokens": pa.array(_token_bytes(encoder.tokenizer(), judged), pa.large_binary()),
        }
    )


def _token_bytes(tokenizer: Tokenizer, judged: list[tuple[int, str]]) -> list[bytes]:
    kind = token_dtype(tokenizer.vocab_size)
    encoded = iter(tokenizer.encode_batch([text for verdict, text in judged if verdict == GOOD]))
    return [
        np.append(next(encoded), tokenizer.eod_id).astype(kind).tobytes()
        if verdict == GOOD
        else b""
        for verdict, _ in judged
    ]
