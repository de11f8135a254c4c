"""Progress of work that takes a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
EVERY_S = 2.0
"""Seconds between two lines of `announced`."""


def progress(total: int, label: str, unit: str) -> Any:
    """A bar on stderr, with percent and time left, for work that takes more than a second."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, delay=1.0)


def announced(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """The items, of which there are `total`; a line on stderr every few seconds has the time left.

    Needs no package, as `progress` does.
    """
    began = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown > EVERY_S:
            shown = now
            left = (now - began) * (total - done) / done
            print(f"{label}: {done / total:.0%}, {left:.0f} s left", file=sys.stderr)
