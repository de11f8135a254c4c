"""Text that spells a special token: other ids for it, or the place where there are none.

A tokenizer's own model may yield the id of a special token from plain text: a unigram piece
`</s>`, merges that reach it, an added token that is not flagged special.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megascale.arrays import Booleans

EXCERPT = 24
"""Characters of a text that a message shows."""


@dataclass(frozen=True)
class Refused:
    """A text whose encoding would hold a special token, or would lose the text that spells it."""

    place: int
    """The first character concerned."""
    excerpt: str
    """The text from there on."""

    def __str__(self) -> str:
        return f"at character {self.place}: {ascii(self.excerpt)}"


def refused_at(text: str, place: int) -> Refused:
    """A refusal of `text` because of the character at `place`."""
    return Refused(place, text[place : place + EXCERPT])


def special_ids(backend: Any, named: Iterable[int], unknown_id: int | None) -> tuple[int, ...]:
    """Ids that text must never become: those `named`, and added tokens that are flagged special.

    The unknown token is not among them unless it is named: text without ids becomes it.
    """
    flagged = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return tuple(sorted((flagged - {unknown_id}) | set(named)))


def unknown_id_of(backend: Any) -> int | None:
    """The id of text that a model of the `tokenizers` library has no ids for; None: none."""
    token = getattr(backend.model, "unk_token", None)
    if token is not None:
        known = backend.token_to_id(token)
        return None if known is None else int(known)
    if type(backend.model).__name__ != "Unigram":
        return None
    unknown = json.loads(backend.to_str())["model"]["unk_id"]
    return None if unknown is None else int(unknown)


def without_ids(backend: Any, ids: Collection[int]) -> Any:
    """A copy of a tokenizer that yields none of `ids`: no text spells their new names."""
    tree = json.loads(backend.to_str())
    names = {str(backend.id_to_token(i)): f"\uffff{i}\uffff" for i in ids}
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _rename(tree["model"], names)
    tree["post_processor"] = None  # it may name special tokens, and adds nothing here
    other = type(backend).from_str(json.dumps(tree))
    other.encode_special_tokens = True
    return other


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give pieces of a model other names, and take out the merges that make or use them."""
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    cut = len(model.get("continuing_subword_prefix") or "")
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [
            (left, right)
            for left, right in pairs
            if not {left, right, left + right[cut:]} & names.keys()
        ]


def first_lost(before: Any, after: Any, length: int, unknown_id: int | None) -> int | None:
    """The first of `length` characters that has an id in an encoding `before` and none `after`.

    The unknown token does not count as an id of its characters.
    """
    lost = _has_ids(before, length, unknown_id) & ~_has_ids(after, length, unknown_id)
    return int(lost.argmax()) if lost.any() else None


def _has_ids(encoding: Any, length: int, unknown_id: int | None) -> Booleans:
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    spans = spans[
        np.array(encoding.ids, dtype=np.int64) != (-1 if unknown_id is None else unknown_id)
    ]
    change = np.zeros(length + 1, dtype=np.int64)
    np.add.at(change, spans[:, 0], 1)
    np.add.at(change, spans[:, 1], -1)
    return np.cumsum(change)[:length] > 0
