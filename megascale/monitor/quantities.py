"""Counts, sizes, durations, moments and names as short text."""

from __future__ import annotations

import time
from collections.abc import Sequence

MOST_NAMES, MOST_NAME_CHARACTERS = 4, 28
"""Of a list of names, and of each of them."""


def show_count(count: float) -> str:
    """A count in three or four digits: 987, 41.2K, 3.4M."""
    if count < 999.5:
        return f"{count:.0f}"
    for unit in "KMG":
        count /= 1000
        if count < 999.95:
            return f"{count:.1f}{unit}"
    return f"{count / 1000:.1f}T"


def show_bytes(number: float) -> str:
    """Bytes in the largest binary unit: 12.0 B, 1.5 MiB, 85.3 GiB."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}"


def show_duration(seconds: float) -> str:
    """Whole seconds in the two largest units: 8s, 1m05s, 2h07m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def clock(seconds: float) -> str:
    """A moment, in seconds since the epoch, as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def show_names(names: Sequence[str]) -> str:
    """Names in a row, for a title: the first few, and how many more there are."""
    shown = [
        name if len(name) <= MOST_NAME_CHARACTERS else f"{name[: MOST_NAME_CHARACTERS - 3]}..."
        for name in names[:MOST_NAMES]
    ]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
