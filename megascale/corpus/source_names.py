"""Which source a document names, and the folder of the corpus of each source."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from megascale.corpus.recipe import MOST_CORPORA
from megascale.corpus.sources import SET_FILE
from megascale.errors import UserError
from megascale.parsing import is_plain_name

MOST_CHARACTERS = 200
"""Of the name of a source."""
_MOST_FOLDER_BYTES = 100
_SHOWN = 40
_EXAMPLES = 3
_UNSAFE = re.compile(r"[^\w.+-]+")


def checked_source(value: Any, column: str, where: Callable[[], str]) -> str:
    """The source that a document names by `value`, which it has under `column`.

    Raises UserError, which begins with `where()`, for anything but a text that can be a name.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        if is_plain_name(value) and len(value) <= MOST_CHARACTERS and _is_unicode(value):
            return value
        shown = ascii(value[:_SHOWN]) + "..." * (len(value) > _SHOWN)
        problem = f"{shown}, which is no name of a source"
    else:
        problem = f"{'null' if value is None else type(value).__name__} and no text"
    raise UserError(
        f"{where()}: '{column}', the source_column, holds {problem}; mend the document, leave it "
        "out or set source_column"
    )


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def require_few(sources: Collection[str]) -> None:
    """Raise UserError where more sources are named than a recipe makes corpora."""
    if len(sources) > MOST_CORPORA:
        some = ", ".join(repr(name[:_SHOWN]) for name in sorted(sources)[:_EXAMPLES])
        raise UserError(
            f"source_column names more than {MOST_CORPORA} sources, such as {some}; a recipe makes "
            f"at most {MOST_CORPORA} corpora: set source_column to a column of fewer values"
        )


def folder_names(sources: Collection[str]) -> dict[str, str]:
    """The folder of each source: its name, with `_` for what is not safe in the name of a folder.

    Names that would be the same on some file system, or that of another file there, get a digest of
    the source at their end. So the folders follow from the sources alone.
    """
    plain = {source: _safe(source) for source in sources}
    met = Counter([SET_FILE, *(name.casefold() for name in plain.values())])
    return {
        source: name if met[name.casefold()] == 1 and _fits(name) else _with_digest(source, name)
        for source, name in plain.items()
    }


def _safe(source: str) -> str:
    name = _UNSAFE.sub("_", unicodedata.normalize("NFC", source))
    return name if not name.startswith((".", "-")) else f"_{name[1:]}"


def _fits(name: str) -> bool:
    return len(name.encode()) <= _MOST_FOLDER_BYTES


def _with_digest(source: str, name: str) -> str:
    end = hashlib.blake2b(source.encode(), digest_size=6).hexdigest()
    begin = name.encode()[:_MOST_FOLDER_BYTES].decode("utf-8", "ignore")
    return f"{begin}-{end}"
