"""What becomes of each document of a recipe, and how much of the text its tokenizer gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Booleans, Integers
from megascale.corpus.encode import EMPTY, GOOD, INVALID, REFUSED, text_of
from megascale.corpus.inputs import Table, read_documents
from megascale.corpus.recipe import Recipe
from megascale.corpus.round_trip import example_of
from megascale.corpus.tokenizers import Tokenizer
from megascale.errors import UserError


@dataclass(frozen=True)
class Fates:
    """What becomes of each document of a recipe, or of those of a corpus of it, in order."""

    verdict: NDArray[np.int8]
    repeated: Booleans
    """Good documents that are left out because one before has the same text."""
    keep: Booleans
    heldout: Booleans
    num_bytes: Integers
    weight: Integers
    """Bytes of text for which a document stands among those that were decoded; 0: it was not."""
    returned: Integers
    """Bytes of a decoded document that come back."""
    changed: Booleans
    """Text that does not come back."""

    def among(self, documents: Booleans) -> Fates:
        """The same, where other documents than these count as not kept."""
        return replace(self, keep=self.keep & documents, heldout=self.heldout & documents)


def heldout_below(recipe: Recipe) -> int:
    """Documents whose hash (its high 64 bits) is below this are held out."""
    return int(recipe.heldout_fraction * 2.0**64)


def decide(recipe: Recipe, tables: Sequence[Table], files: Sequence[str]) -> Fates:
    """Which documents of a recipe stay, and which of them are held out.

    Raises UserError for text that the tokenizer or the recipe refuses.
    """
    verdict = _column(files, "verdict", np.int8)
    high, low = _column(files, "high", np.uint64), _column(files, "low", np.uint64)
    good = verdict == GOOD
    again = good & _repeated(high, low, good) if recipe.deduplicate else np.zeros_like(good)
    invalid = np.flatnonzero(verdict == INVALID)
    if len(invalid) and recipe.invalid_utf8 == "error":
        raise UserError(
            f"{_where(tables, int(invalid[0]))}: not UTF-8, and so are {len(invalid):,} documents "
            "in all; mend them or set invalid_utf8=skip"
        )
    _require_none_refused(tables, files, np.flatnonzero(verdict == REFUSED))
    keep = good & ~again
    return Fates(
        verdict,
        again,
        keep,
        heldout=keep & (high < np.uint64(heldout_below(recipe))),
        num_bytes=_column(files, "bytes", np.int64),
        weight=_column(files, "weight", np.int64),
        returned=_column(files, "returned", np.int64),
        changed=_column(files, "changed", np.bool_),
    )


def skipped_of(fates: Fates, documents: Booleans, tables: Sequence[Table]) -> dict[str, Any]:
    """How many of the documents of a corpus were left out, and why, for corpus.json."""
    invalid = np.flatnonzero(documents & (fates.verdict == INVALID))
    return {
        "empty": int((documents & (fates.verdict == EMPTY)).sum()),
        "duplicates": int((documents & fates.repeated).sum()),
        "invalid_utf8": len(invalid),
        "first_invalid_utf8": _where(tables, int(invalid[0])) if len(invalid) else None,
    }


def nothing_to_train_on(fates: Fates, documents: Booleans) -> str | None:
    """A line where no document of a corpus is left to train on; None where one is."""
    corpus = fates.among(documents)
    if (corpus.keep & ~corpus.heldout).any():
        return None
    counts = {
        "empty": documents & (fates.verdict == EMPTY),
        "not UTF-8": documents & (fates.verdict == INVALID),
        "held out": corpus.heldout,
        "duplicates of others": documents & fates.repeated,
    }
    said = {what: f"{int(chosen.sum()):,} {what}" for what, chosen in counts.items()}
    if not counts["duplicates of others"].any():
        del said["duplicates of others"]
    return (
        f"no document is left to train on, of {int(documents.sum()):,} read "
        f"({', '.join(said.values())})"
    )


def _require_none_refused(
    tables: Sequence[Table], files: Sequence[str], refused: NDArray[Any]
) -> None:
    if len(refused):
        why = _text(files, "why", int(refused[0]))
        raise UserError(
            f"{_where(tables, int(refused[0]))}, {why}: spells a special token of the tokenizer, "
            f"which has no other ids for that text, and so do {len(refused):,} documents in all; "
            "leave them out or choose another tokenizer"
        )


def _text(files: Sequence[str], name: str, document: int) -> str:
    """One entry of a column of text."""
    from datasets import Dataset

    for file in files:
        column = Dataset.from_file(file).data.column(name)
        if document < len(column):
            return str(column[document].as_py())
        document -= len(column)
    raise IndexError(document)


def _column(files: Sequence[str], name: str, kind: Any) -> NDArray[Any]:
    from datasets import Dataset

    columns = [Dataset.from_file(file).data.column(name).to_numpy() for file in files]
    return np.concatenate([np.empty(0, kind), *columns]).astype(kind)


def _repeated(high: NDArray[np.uint64], low: NDArray[np.uint64], good: Booleans) -> Booleans:
    """Which good documents have the text of a good one before them."""
    order = np.lexsort((low, high))
    order = order[good[order]]
    same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    repeated = np.zeros(len(high), dtype=np.bool_)
    repeated[order[1:][same]] = True
    return repeated


def _where(tables: Sequence[Table], document: int) -> str:
    table, row, batch = _row(tables, document)
    (value,) = batch.column(table.column).cast("large_binary").to_pylist()
    return table.where(row, value or b"")


def _row(tables: Sequence[Table], document: int) -> tuple[Table, int, Any]:
    """The table of a document, its row there and the Arrow columns of that row."""
    for table in tables:
        rows = table.open().with_format("arrow")
        if document < len(rows):
            return table, document, rows[document : document + 1]
        document -= len(rows)
    raise IndexError(document)


def round_trip(
    label: str, recipe: Recipe, tables: Sequence[Table], tokenizer: Tokenizer, fates: Fates
) -> dict[str, Any]:
    """How much of the text that was decoded again came back, with the first that did not.

    `fates` are those of one corpus, which is called `label` in messages. Raises UserError where
    nothing of train came back.
    """
    seen = fates.keep & (fates.weight > 0)
    changed = np.flatnonzero(seen & fates.changed)
    first = None
    if len(changed):
        table, row, batch = _row(tables, int(changed[0]))
        ((raw, _),) = read_documents(table, [row], batch)
        _, text = text_of(raw, recipe.min_characters)
        first = {"document": _where(tables, int(changed[0]))} | example_of(tokenizer, text)
    if not returned_train_bytes(fates):
        raise UserError(
            f"{label}: no text comes back from the ids of its tokenizer; choose a "
            "tokenizer that knows the characters of this text"
        )
    return {
        "documents": int(seen.sum()),
        "changed": len(changed),
        "bytes": int(fates.num_bytes[seen].sum()),
        "returned_bytes": int(fates.returned[seen].sum()),
        "first_changed": first,
    }


def returned_train_bytes(fates: Fates) -> int:
    """Bytes of the text of train that come back: exact where all of it was decoded.

    Else the ratio estimator of a sample in which every byte is as likely as any other.
    """
    train = fates.keep & ~fates.heldout
    seen = train & (fates.weight > 0)
    total, weights = int(fates.num_bytes[train].sum()), fates.weight[seen]
    if not weights.sum():
        return total
    shares = fates.returned[seen] / fates.num_bytes[seen]
    return round(total * float(weights @ shares) / int(weights.sum()))
