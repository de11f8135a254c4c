"""What is printed: text that comes from files must not control the terminal.

A document, a run's name or an error of a library may hold escape sequences, which move the cursor,
set the clipboard, or change the order of characters. On a terminal they would act.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CONTROLS = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line break, C1
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # direction of text, line separators
    r"\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff"  # annotations, tags, surrogates
)
_CONTROL = re.compile(f"[{_CONTROLS}]")
_LINE_AGAIN = re.compile(r"(\r(?:\x1b\[K)?)")
"""How progress bars begin their line again."""
_CURSOR_UP = re.compile(r"(\x1b\[A)+")
"""What progress bars write by itself, to reach the bar above."""


def escape_controls(text: str) -> str:
    """`text` with every control character but tab and line break as an escape, such as `\\x1b`."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class EscapedStream:
    """A text stream on which control characters are written as escapes."""

    def __init__(self, stream: Any, has_bars: bool = False) -> None:
        """`has_bars`: progress bars are drawn there, which begin the line again."""
        self.unescaped = stream
        self._has_bars = has_bars

    def write(self, text: str) -> int:
        """Write `text`; returns its length."""
        if self._has_bars and _CURSOR_UP.fullmatch(text):
            self.unescaped.write(text)
        elif self._has_bars:
            parts = _LINE_AGAIN.split(text)
            parts[::2] = map(escape_controls, parts[::2])
            self.unescaped.write("".join(parts))
        else:
            self.unescaped.write(escape_controls(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """In the block, stdout and stderr show control characters as escapes."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = EscapedStream(before[0]), EscapedStream(before[1], has_bars=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unescaped_stdout() -> Any:
    """stdout for a writer that controls the terminal itself and escapes what it is given."""
    return getattr(sys.stdout, "unescaped", sys.stdout)
