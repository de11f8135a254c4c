"""How much slower each rank counts for the planner, by what was measured of it.

Comparisons are smoothed and rounded, and what counts changes only where it is clearly off, so that
plans do not change with the noise. Values hold from a step on for which no plan has been begun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megascale.arrays import Floats

GRID = 0.05
"""Slowdowns are whole multiples of this above 1."""
SMOOTH = 0.3
"""Weight of the newest comparison."""
OFF = 0.8
"""Parts of the grid by which a value must be off before it changes."""
MOST = 4.0
"""A rank that is even slower should be replaced rather than spared."""


class RankSpeeds:
    """The slowdowns that plans count with."""

    def __init__(self, position: Sequence[int], ahead_steps: int) -> None:
        """`position` is the place of each rank on the HDP axis: the slowest of a place counts.

        Plans are begun `ahead_steps` steps before theirs trains.
        """
        self._position = np.asarray(position, dtype=np.int64)
        self._ahead_steps = ahead_steps
        self._num = int(self._position.max()) + 1
        self._level = np.ones(self._num)
        self._changes: list[tuple[int, tuple[float, ...]]] = []
        """From which step on which slowdowns hold, in order."""

    def at(self, step: int) -> tuple[float, ...]:
        """The slowdown of each place of the HDP axis in a step; empty: all are alike."""
        held = [slowdown for first, slowdown in list(self._changes) if first <= step]
        return held[-1] if held and max(held[-1]) > 1 else ()

    def see(self, step: int, over_R: Floats) -> int | None:
        """Take a comparison of the ranks (`monitor.stragglers.slowdown_R`) after `step`.

        The step from which on other slowdowns hold, where this changes them.
        """
        told = np.full(self._num, -np.inf)
        np.maximum.at(told, self._position, np.where(np.isfinite(over_R), over_R, -np.inf))
        seen = np.where(np.isfinite(told), np.clip(told, 1 / MOST, MOST), self._level)
        self._level += SMOOTH * (seen - self._level)
        before = np.array(self._changes[-1][1] if self._changes else (1.0,) * self._num)
        aim = np.clip(np.round(self._level / GRID) * GRID, 1.0, MOST)
        now = np.where(np.abs(self._level - before) > OFF * GRID, aim, before)
        if np.array_equal(now, before):
            return None
        first = step + self._ahead_steps + 1
        kept = [one for one in self._changes if one[0] > step + 1]
        current = [one for one in self._changes if one[0] <= step + 1][-1:]
        self._changes = [*current, *kept, (first, tuple(np.round(now, 2).tolist()))]
        return first

    def to_json(self) -> dict[str, Any]:
        """As plain values for a checkpoint, so that a resumed run plans as this one would have."""
        return {"level": self._level.tolist(), "changes": self._changes}

    def go_on(self, saved: Mapping[str, Any] | None) -> bool:
        """Go on as `to_json` says; False where that was of other ranks, which count as alike."""
        if saved is None:
            return True
        if len(saved["level"]) != self._num:
            return False
        self._level = np.array(saved["level"])
        self._changes = [(int(first), tuple(slowdown)) for first, slowdown in saved["changes"]]
        return True
