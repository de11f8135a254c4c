"""A run's own account of where its time goes, for its `progress` and `stop` events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SPENT = ("training", "planning", "evaluation", "saving")
"""The parts of the account."""
PROGRESS_S = 30.0
"""Seconds between two accounts, of which a crash loses the last."""


class TimeSpent:
    """Sums of seconds by SPENT since the start of a run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(SPENT, 0.0)
        self._written = clock()

    def add(self, part: str, seconds: float) -> None:
        """Add to a part of SPENT."""
        self._seconds[part] += seconds

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part of SPENT."""
        began = self._clock()
        try:
            yield
        finally:
            self.add(part, self._clock() - began)

    def is_due(self) -> bool:
        """Whether PROGRESS_S have passed since this was last true, or since the start."""
        if self._clock() - self._written <= PROGRESS_S:
            return False
        self._written = self._clock()
        return True

    def sums(self) -> dict[str, float]:
        """The account, in milliseconds' precision."""
        return {part: round(seconds, 3) for part, seconds in self._seconds.items()}
