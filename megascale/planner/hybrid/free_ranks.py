"""Ranks of waves that rings can still take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megascale.planner.problem import Problem


class FreeRanks:
    """Ranks of each wave that no ring has taken yet, counted by cell: ranks of a node that are
    equally fast, which stand together in `order`."""

    def __init__(self, problem: Problem, num_waves: int, order: Sequence[int]) -> None:
        self._node_size = problem.cost.node_size
        kinds = [(rank // self._node_size, problem.slowest([rank])) for rank in order]
        cells = Counter(kinds)
        self._sizes = np.array(list(cells.values()), dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._paces = np.array([pace for _, pace in cells])
        nodes = np.array([node for node, _ in cells])
        self._node_begins = np.flatnonzero(np.diff(nodes, prepend=-1))
        self._free = np.tile(self._sizes, (num_waves, 1))
        self._by_free: dict[float, list[list[tuple[int, int]]]] = {}

    def take_across(
        self, size: int, wave: int | None, pace: float | None
    ) -> tuple[int, tuple[int, ...]] | None:
        """(wave, places) for a ring that spans cells: of the fullest wave with room unless given.

        Of ranks of one pace, or of all. Whole cells are taken first, so that what is left serves
        rings within a node. To be called before `take_within`, or where that found nothing.
        """
        able = self._free if pace is None else np.where(self._paces == pace, self._free, 0)
        totals = able.sum(axis=1)
        waves = np.flatnonzero(totals >= size) if wave is None else np.array([wave])
        if not len(waves) or totals[waves[0]] < size:
            return None
        wave = int(waves[totals[waves].argmin()])
        places: list[int] = []
        free = able[wave].copy()
        for cell in np.argsort(-free, kind="stable").tolist():
            if size - len(places) < free[cell]:
                break
            places += self._cut(wave, cell, int(free[cell]))
            free[cell] = 0
        if len(places) < size:
            fits = np.where(free >= size - len(places), free, self._node_size + 1)
            places += self._cut(wave, int(fits.argmin()), size - len(places))
        self._by_free = {}
        return wave, tuple(places)

    def take_in_wave(
        self, size: int, wave: int, pace: float | None
    ) -> tuple[int, tuple[int, ...]] | None:
        """(wave, places) for a ring within one node of a wave, the fullest that has room.

        Of ranks of one pace, or of all.
        """
        if pace is None:
            return self._take_mixed(size, wave)
        free = np.where(self._paces == pace, self._free[wave], 0)
        fits = np.where(free >= size, free, self._node_size + 1)
        cell = int(fits.argmin())
        if fits[cell] > self._node_size:
            return None
        self._by_free = {}
        return wave, tuple(self._cut(wave, cell, size))

    def take_within(self, size: int, pace: float | None) -> tuple[int, tuple[int, ...]] | None:
        """(wave, places) for a ring within one node, the fullest that has room for it.

        Of ranks of one pace, or of all.
        """
        if pace is None:
            totals = np.add.reduceat(self._free, self._node_begins, axis=1)
            fits = np.where(totals >= size, totals, self._node_size + 1)
            return self._take_mixed(size, int(fits.min(axis=1).argmin()))
        if pace not in self._by_free:
            self._by_free[pace] = [[] for _ in range(self._node_size + 1)]
            for wave, cell in np.argwhere((self._free > 0) & (self._paces == pace))[::-1].tolist():
                self._by_free[pace][self._free[wave, cell]].append((wave, cell))
        by_free = self._by_free[pace]
        for cells in by_free[size:]:
            if cells:
                wave, cell = cells.pop()
                places = self._cut(wave, cell, size)
                by_free[self._free[wave, cell]].append((wave, cell))
                return wave, tuple(places)
        return None

    def rest(self) -> list[tuple[int, int]]:
        """(wave, place) of all that is left."""
        left = []
        for wave, cell in np.argwhere(self._free > 0).tolist():
            end = int(self._ends[cell])
            left += [(wave, place) for place in range(end - int(self._free[wave, cell]), end)]
        return left

    def _take_mixed(self, size: int, wave: int) -> tuple[int, tuple[int, ...]] | None:
        """Ranks of any pace of one node of `wave`, fast ones first."""
        totals = np.add.reduceat(self._free[wave], self._node_begins)
        fits = np.where(totals >= size, totals, self._node_size + 1)
        node = int(fits.argmin())
        if fits[node] > self._node_size:
            return None
        places: list[int] = []
        cell = int(self._node_begins[node])
        while len(places) < size:
            taken = min(size - len(places), int(self._free[wave, cell]))
            places += self._cut(wave, cell, taken)
            cell += 1
        self._by_free = {}
        return wave, tuple(places)

    def _cut(self, wave: int, cell: int, size: int) -> list[int]:
        begin = int(self._ends[cell] - self._free[wave, cell])
        self._free[wave, cell] -= size
        return list(range(begin, begin + size))
