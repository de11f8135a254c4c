"""Counts, durations and moments as short text."""

from __future__ import annotations

import time


def show_count(count: float) -> str:
    """A count in three or four digits: 987, 41.2K, 3.4M."""
    if count < 999.5:
        return f"{count:.0f}"
    for unit in "KMG":
        count /= 1000
        if count < 999.95:
            return f"{count:.1f}{unit}"
    return f"{count / 1000:.1f}T"


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
