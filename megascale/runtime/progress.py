"""A bar for work that takes a while."""

from __future__ import annotations

from typing import Any


def progress(total: int, label: str, unit: str) -> Any:
    """A bar on stderr, with percent and time left, for work that takes more than a second."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, delay=1.0)
