"""Whether text comes back from its ids, and how much of it: what a lossy tokenizer drops.

A tokenizer without bytes and without an unknown token drops what it does not know; one with a
normaliser changes text. Loss in bits over all bytes of the text would then flatter a model, which
never has to predict what was dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megascale.arrays import Integers, Tokens
from megascale.corpus.sources import PARTS, RETURNED, returned_bytes
from megascale.corpus.special_tokens import EXCERPT
from megascale.corpus.tokenizers import FastTokenizer, Tokenizer

LOSSY = "documents do not decode to the text they were made from"
WHOLE_BYTES = 1 << 28
"""An input of at most so many bytes is decoded whole, if a tokenizer of Hugging Face made the ids.
The other kinds of tokenizer lose nothing by construction, so a sample is enough."""
SAMPLED_PLACES = 1024
"""So many bytes of any other input are drawn, about, and their documents are decoded."""


@dataclass(frozen=True)
class RoundTrip:
    """How a text and the text of its ids compare."""

    num_bytes: int
    """Bytes of UTF-8 of the text."""
    returned_bytes: int
    """Bytes of it that come back: of each value of a byte as many as both texts have."""
    place: int | None
    """The first character that differs; None where the text comes back."""


def compare_texts(text: str, decoded: str) -> RoundTrip:
    """A text beside the text that its ids decode to."""
    raw = text.encode()
    if text == decoded:
        return RoundTrip(len(raw), len(raw), None)
    returned = int(np.minimum(_byte_counts(raw), _byte_counts(decoded.encode())).sum())
    return RoundTrip(len(raw), returned, first_difference(text, decoded))


def _byte_counts(raw: bytes) -> Integers:
    return np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256)


def first_difference(text: str, other: str) -> int:
    """The first character that differs in two texts that do."""
    low, high = 0, min(len(text), len(other))
    while low < high:  # the first `low` are the same
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


def stride_of(num_bytes: int, kind: str) -> int:
    """Bytes of text per document that is decoded, of an input of `num_bytes`; 1: decode all.

    `kind` is that of the tokenizer.
    """
    is_whole = kind == "hf" and num_bytes <= WHOLE_BYTES
    return 1 if is_whole else max(1, num_bytes // SAMPLED_PLACES)


def is_drawn(low: int, num_bytes: int, stride: int) -> bool:
    """Whether a document of `num_bytes` is decoded, with probability `num_bytes` / `stride`.

    So every byte of text is as likely as any other to be in a decoded document, and documents of
    `stride` bytes or more are all decoded. `low` is the low half of the hash of the text; the high
    half decides which documents are held out.
    """
    return low * stride < num_bytes << 64


def example_of(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Where a text that does not come back first differs, for corpus.json."""
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    place = first_difference(text, decoded)
    return {
        "character": place,
        "text": text[place : place + EXCERPT],
        "decoded": decoded[place : place + EXCERPT],
        "cause": _cause(tokenizer, text, ids, decoded),
    }


def _cause(tokenizer: Tokenizer, text: str, ids: Tokens, decoded: str) -> str:
    if tokenizer.unknown_id is not None and (ids == tokenizer.unknown_id).any():
        return "the tokenizer has no ids for some of it"
    if isinstance(tokenizer, FastTokenizer) and tokenizer.normalize(text) == decoded != text:
        return "the tokenizer's normaliser changes text"
    return "the tokenizer drops or changes some of it"


def losses(facts: Mapping[str, Any]) -> Iterator[str]:
    """What corpus.json says of text that its tokenizer does not give back, a line each."""
    trip = facts.get("round_trip")
    if not trip:
        return
    if trip["changed"]:
        first = trip["first_changed"]
        yield (
            f"{trip['changed']:,} of {trip['documents']:,} {LOSSY}; the first is "
            f"{first['document']}, at character {first['character']}: "
            f"{ascii(first['text'])} comes back as {ascii(first['decoded'])} ({first['cause']}). "
            f"{_returned_share(facts)} of the bytes come back; bits per byte count these alone"
        )
    if facts["tokenizer"]["kind"] == "hf" and RETURNED not in facts["train"]:
        yield (
            "an earlier version of megascale decoded only the beginnings of some documents, so "
            "text that does not come back may be missing here and count in bits per byte; prepare "
            "the corpus again with --force to decode all of it"
        )
    if trip["unknown_tokens"]:
        yield f"{trip['unknown_tokens']:,} tokens of train are the tokenizer's unknown token"


def _returned_share(facts: Mapping[str, Any]) -> str:
    """The part of the text that comes back, and what was decoded to measure it."""
    documents, num_bytes = (
        sum(facts[part][key] for part in PARTS) for key in ("documents", "bytes")
    )
    share = f"{sum(returned_bytes(facts, part) for part in PARTS) / num_bytes:.2%}"
    decoded, heldout = facts["round_trip"]["documents"], facts["heldout"]["documents"]
    if decoded == documents:
        return f"All documents were decoded: {share}"
    return (
        f"{decoded:,} of {documents:,} documents were decoded ({heldout:,} held-out ones, and of "
        f"the others a sample in proportion to their length): about {share}"
    )
