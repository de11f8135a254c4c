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
from numpy.typing import NDArray

from megascale.corpus.special import EXCERPT, Refused
from megascale.corpus.tokenizers import FastTokenizer, Tokenizer, Tokens, encode_each

LOSSY = "documents do not decode to the text they were made from"
SAMPLED_DOCUMENTS = 256
"""Of every input, about, spread evenly; all that are held out come on top."""
SAMPLED_CHARACTERS = 1 << 16
"""Of a sampled document the beginning, where it is longer."""


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


def _byte_counts(raw: bytes) -> NDArray[np.int64]:
    return np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256)


def first_difference(text: str, other: str) -> int:
    """The first character that differs in two texts that do."""
    low, high = 0, min(len(text), len(other))
    while low < high:  # the first `low` are the same
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


def beginning_of(tokenizer: Tokenizer, text: str, ids: Tokens) -> tuple[str, Tokens | None]:
    """What a sample looks at of a document: its text and ids, None for a cut without ids."""
    if len(text) <= SAMPLED_CHARACTERS:
        return text, ids
    text = text[:SAMPLED_CHARACTERS]
    (cut,) = encode_each(tokenizer, [text])
    return text, None if isinstance(cut, Refused) else cut


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
        first, share = trip["first_changed"], trip["returned_bytes"] / trip["bytes"]
        yield (
            f"{trip['changed']:,} of {trip['documents']:,} {LOSSY}; the first is "
            f"{first['document']}, at character {first['character']}: "
            f"{ascii(first['text'])} comes back as {ascii(first['decoded'])} ({first['cause']}). "
            f"{share:.2%} of the bytes come back; bits per byte count these alone"
        )
    if trip["unknown_tokens"]:
        yield f"{trip['unknown_tokens']:,} tokens of train are the tokenizer's unknown token"
