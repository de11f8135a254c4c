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

from megascale.arrays import Tokens
from megascale.corpus.inputs import Table, read_documents
from megascale.corpus.round_trip import RoundTrip, compare_texts, is_drawn, stride_of
from megascale.corpus.source_names import require_few
from megascale.corpus.special_tokens import Refused
from megascale.corpus.tokenizers import Tokenizer, encode_each, open_tokenizer, token_dtype

GOOD, EMPTY, INVALID, REFUSED = 0, 1, 2, 3
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Encoder:
    """What a process needs to tokenize; small, for it is sent to each."""

    kind: str
    folder: str
    eod_id: int
    bos_id: int | None
    special_ids: tuple[int, ...]
    min_characters: int
    heldout_below: int
    """Documents whose hash (its high 64 bits) is below this are held out."""

    @staticmethod
    def of(tokenizer: Tokenizer, folder: Path, min_characters: int, heldout_below: int) -> Encoder:
        """What encodes as `tokenizer`, which was saved into `folder`."""
        return Encoder(
            tokenizer.kind,
            str(folder),
            tokenizer.eod_id,
            tokenizer.bos_id,
            tokenizer.special_ids,
            min_characters,
            heldout_below,
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once per process."""
        return _open_once(self.kind, self.folder, self.eod_id, self.bos_id, self.special_ids)


@functools.cache
def _open_once(
    kind: str, folder: str, eod_id: int, bos_id: int | None, special_ids: tuple[int, ...]
) -> Tokenizer:
    return open_tokenizer(kind, Path(folder), eod_id, bos_id, special_ids)


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

    Columns: verdict int8 (GOOD, EMPTY, INVALID, REFUSED for one that the tokenizer has no ids
    for), why (text, of a refusal), source (text, where documents name theirs), high and low uint64
    (hash of the text), bytes int64 (of UTF-8), tokens (bytes of the ids, the end of the document
    included); and of documents that were decoded again returned int64 (bytes that come back),
    changed, and weight int64, bytes of text for which the document stands, 0 where it was not
    decoded.
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
                fn_kwargs={
                    "table": table,
                    "first_row": rows.start,
                    "encoder": encoder,
                    "stride": stride_of(table.num_bytes(), encoder.kind),
                    "sources": set(),
                },
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

    kinds = {"verdict": "int8", "why": "string", "source": "string"}
    kinds |= {"high": "uint64", "low": "uint64"}
    kinds |= {"bytes": "int64", "weight": "int64", "returned": "int64", "changed": "bool"}
    return Features(
        {name: Value(kind) for name, kind in (kinds | {"tokens": "large_binary"}).items()}
    )


def _encode_batch(
    batch: Any,
    indices: list[int],
    table: Table,
    first_row: int,
    encoder: Encoder,
    stride: int,
    sources: set[str],
) -> Any:
    """`sources` are those that the documents of this process have named, which are counted."""
    import pyarrow as pa

    documents = read_documents(table, [first_row + i for i in indices], batch)
    raws, named = [raw for raw, _ in documents], [source for _, source in documents]
    sources.update(source for source in named if source is not None)
    require_few(sources)
    judged = [text_of(raw, encoder.min_characters) for raw in raws]
    hashes = [hash_of(raw) for raw in raws]
    encoded = _encode_good(encoder.tokenizer(), judged)
    verdicts = [
        REFUSED if isinstance(ids, Refused) else verdict
        for (verdict, _), ids in zip(judged, encoded, strict=True)
    ]
    weights = [
        _weight(pair, len(raw), encoder.heldout_below, stride)
        for pair, raw in zip(hashes, raws, strict=True)
    ]
    trips = [
        _round_trip(encoder.tokenizer(), text, ids, weight)
        for (_, text), ids, weight in zip(judged, encoded, weights, strict=True)
    ]
    return pa.table(
        {
            "verdict": pa.array(verdicts, pa.int8()),
            "why": pa.array([str(i) if isinstance(i, Refused) else "" for i in encoded]),
            "source": pa.array(named, pa.string()),
            "high": pa.array([high for high, _ in hashes], pa.uint64()),
            "low": pa.array([low for _, low in hashes], pa.uint64()),
            "bytes": pa.array([len(raw) for raw in raws], pa.int64()),
            "weight": pa.array(weights, pa.int64()),
            "returned": pa.array([trip.returned_bytes for trip in trips], pa.int64()),
            "changed": pa.array([trip.place is not None for trip in trips], pa.bool_()),
            "tokens": pa.array(_token_bytes(encoder.tokenizer(), encoded), pa.large_binary()),
        }
    )


def _encode_good(
    tokenizer: Tokenizer, judged: list[tuple[int, str]]
) -> list[Tokens | Refused | None]:
    """The ids of good documents, or why they have none; None for the others."""
    texts = [text for verdict, text in judged if verdict == GOOD]
    encoded = iter(encode_each(tokenizer, texts))
    return [next(encoded) if verdict == GOOD else None for verdict, _ in judged]


def _weight(hashes: tuple[int, int], num_bytes: int, heldout_below: int, stride: int) -> int:
    """Bytes of text for which a document stands among those that are decoded; 0: not decoded."""
    high, low = hashes
    if high < heldout_below:
        return num_bytes
    return max(num_bytes, stride) if is_drawn(low, num_bytes, stride) else 0


_NOT_DECODED = RoundTrip(0, 0, None)


def _round_trip(
    tokenizer: Tokenizer, text: str, ids: Tokens | Refused | None, weight: int
) -> RoundTrip:
    """A document beside what its ids decode to, where it has a weight."""
    if ids is None or isinstance(ids, Refused) or not weight:
        return _NOT_DECODED
    return compare_texts(text, tokenizer.decode(ids))


def _token_bytes(tokenizer: Tokenizer, encoded: list[Tokens | Refused | None]) -> list[bytes]:
    kind = token_dtype(tokenizer.vocab_size)
    return [
        b""
        if ids is None or isinstance(ids, Refused)
        else np.append(ids, tokenizer.eod_id).astype(kind).tobytes()
        for ids in encoded
    ]
