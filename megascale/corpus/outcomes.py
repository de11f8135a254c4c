"""What becomes of each document of a recipe, and how much of the text its tokenizer gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Booleans, Integers
from megascale.corpus.encode import EMPTY, GOOD, INVALID, REFUSED, text_of
from megascale.corpus.inputs import Table, read_document
from megascale.corpus.recipe import Recipe
from megascale.corpus.round_trip import example_of
from megascale.corpus.tokenizers import Tokenizer
from megascale.errors import UserError


@dataclass(frozen=True)
class Fates:
    """What becomes of each document, in order."""

    keep: Booleans
    heldout: Booleans
    num_bytes: Integers
    weight: Integers
    """Bytes of text for which a document stands among those that were decoded; 0: it was not."""
    returned: Integers
    """Bytes of a decoded document that come back."""
    changed: Booleans
    """Text that does not come back."""
    skipped: dict[str, Any]


def heldout_below(recipe: Recipe) -> int:
    """Documents whose hash (its high 64 bits) is below this are held out."""
    return int(recipe.heldout_fraction * 2.0**64)


def decide(recipe: Recipe, tables: Sequence[Table], files: Sequence[str]) -> Fates:
    """Which documents stay, and which of them are held out. Raises UserError where none stay."""
    verdict = _column(files, "verdict", np.int8)
    high, low = _column(files, "high", np.uint64), _column(files, "low", np.uint64)
    good = verdict == GOOD
    again = good & _repeated(high, low, good) if recipe.deduplicate else np.zeros_like(good)
    invalid = np.flatnonzero(verdict == INVALID)
    first = _where(tables, int(invalid[0])) if len(invalid) else None
    if first is not None and recipe.invalid_utf8 == "error":
        raise UserError(
            f"{first}: not UTF-8, and so are {len(invalid):,} documents in all; mend them or set "
            "invalid_utf8=skip"
        )
    skipped = {
        "empty": int((verdict == EMPTY).sum()),
        "duplicates": int(again.sum()),
        "invalid_utf8": len(invalid),
        "first_invalid_utf8": first,
    }
    _require_none_refused(tables, files, np.flatnonzero(verdict == REFUSED))
    keep = good & ~again
    heldout = keep & (high < np.uint64(heldout_below(recipe)))
    if not (keep & ~heldout).any():
        raise UserError(
            f"recipe {recipe.name}: no document is left to train on, of {len(good):,} read "
            f"({skipped['empty']:,} empty, {len(invalid):,} not UTF-8, {int(heldout.sum()):,} "
            "held out); give it more text"
        )
    return Fates(
        keep,
        heldout,
        num_bytes=_column(files, "bytes", np.int64),
        weight=_column(files, "weight", np.int64),
        returned=_column(files, "returned", np.int64),
        changed=_column(files, "changed", np.bool_),
        skipped=skipped,
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
    table, row, value = _row(tables, document)
    return table.where(row, value)


def _row(tables: Sequence[Table], document: int) -> tuple[Table, int, bytes]:
    """The table of a document, its row there and what the row holds."""
    for table in tables:
        rows = table.open().with_format("arrow")
        if document < len(rows):
            value = rows[document : document + 1].column(table.column).cast("large_binary")
            return table, document, value[0].as_py() or b""
        document -= len(rows)
    raise IndexError(document)


def round_trip(
    recipe: Recipe, tables: Sequence[Table], tokenizer: Tokenizer, fates: Fates
) -> dict[str, Any]:
    """How much of the text that was decoded again came back, with the first that did not.

    Raises UserError where nothing of train did.
    """
    seen = fates.keep & (fates.weight > 0)
    changed = np.flatnonzero(seen & fates.changed)
    first = None
    if len(changed):
        row = _row(tables, int(changed[0]))
        _, text = text_of(read_document(*row), recipe.min_characters)
        first = {"document": _where(tables, int(changed[0]))} | example_of(tokenizer, text)
    if not returned_train_bytes(fates):
        raise UserError(
            f"recipe {recipe.name}: no text comes back from the ids of its tokenizer; choose a "
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
