"""What windows hold: a table, and a picture of a text cut into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megascale.errors import UserError
from megascale.infowindow.codebook import Codebook, TreeCoder

_LINES, _COLUMNS = 18, 88
_COLOURS = ("#cfe8ff", "#ffe3b8", "#d6f5d0", "#ffd3dc")


@dataclass(frozen=True)
class Look:
    """A text through a codebook."""

    windows: list[bytes]
    codes: NDArray[np.uint16]
    strings: list[bytes]


def look(book: Codebook, text: bytes) -> Look:
    """Cut a text into windows. Raises UserError for a code without a dictionary, and no text."""
    coder = book.coder
    if not isinstance(coder, TreeCoder):
        raise UserError("only a code with a dictionary can be looked at; compile with --bits 16")
    if not text:
        raise UserError("the text is empty; give another with --text")
    codes, _ = coder.tree.encode(np.frombuffer(text, np.uint8))
    return Look([book.strings[code] for code in codes.tolist()], codes, book.strings)


def table(found: Look, rows: int) -> Iterator[str]:
    """What windows of the text hold, by length and by string, a line each."""
    count, held = len(found.windows), sum(map(len, found.windows))
    used = Counter(found.windows)
    yield f"{held:,} bytes in {count:,} windows: {held / count:.3f} bytes each"
    yield f"{len(used):,} of {len(found.strings):,} strings used, {_broken(found):.1%} of windows"
    yield "begin or end inside a character"
    yield ""
    yield f"{'bytes':>5} {'strings':>9} {'windows':>9}  share of the text"
    in_book, in_text = Counter(map(len, found.strings)), Counter(map(len, found.windows))
    for length in sorted(in_text):
        part = length * in_text[length] / held
        bar = "#" * round(part * 60)
        yield f"{length:>5} {in_book[length]:>9,} {in_text[length]:>9,}  {part:6.1%} {bar}"
    yield ""
    yield f"{'code':>5} {'windows':>9}  string"
    code_of = dict(zip(found.windows, found.codes.tolist(), strict=True))
    for string, times in sorted(used.items(), key=lambda pair: (-pair[1], pair[0]))[:rows]:
        yield f"{code_of[string]:>5} {times:>9,}  {shown(string)}"


def shown(string: bytes) -> str:
    """A string in quotes, with escapes for what cannot be printed."""
    return ascii(string.decode("utf-8", errors="surrogateescape"))


def _broken(found: Look) -> float:
    """Part of the windows that are no UTF-8 by themselves."""
    return sum(not _is_text(one) for one in found.windows) / len(found.windows)


def _is_text(string: bytes) -> bool:
    try:
        string.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def draw(found: Look, name: str, path: Path) -> None:
    """The text's first lines with its windows in colours, and how long windows are.

    Raises UserError where `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    text, lengths = figure.subplots(1, 2, width_ratios=[3, 1])
    text.set(xlim=(0, _COLUMNS), ylim=(_LINES, 0), xticks=[], yticks=[])
    text.set_title(f"{name} in windows of 16 bits", fontsize=10)
    for column, row, character, colour in _cells(found):
        text.axvspan(column, column + 1, 1 - (row + 1) / _LINES, 1 - row / _LINES, color=colour)
        text.text(column + 0.5, row + 0.7, character, ha="center", family="monospace", fontsize=8)
    longest = 24
    for windows, label in ((found.strings, "dictionary"), (found.windows, "text")):
        counts = np.bincount([min(len(one), longest) for one in windows], minlength=longest + 1)
        lengths.plot(range(1, longest + 1), counts[1:] / len(windows), marker=".", label=label)
    lengths.set(xlabel=f"bytes in a window ({longest}: or more)", ylabel="part of windows")
    lengths.legend()
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give another --picture") from None


def _cells(found: Look) -> Iterator[tuple[int, int, str, str]]:
    """(column, row, character, colour) of what fits on the picture."""
    column = row = 0
    for i, window in enumerate(found.windows):
        for byte in window:
            character = chr(byte) if 32 <= byte < 127 else "\u21b5" if byte == 10 else "\u00b7"
            yield column, row, character, _COLOURS[i % len(_COLOURS)]
            column += 1
            if byte == 10 or column == _COLUMNS:
                column, row = 0, row + 1
            if row == _LINES:
                return
