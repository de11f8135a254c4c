"""Linear programs for HiGHS whose first column is the time to minimise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Floats, Integers

Cells = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Row, column and value of cells of a matrix."""


class Rows:
    """Rows of a sparse matrix with their bounds, added in blocks."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self._cells: list[Cells] = []

    def add(self, count: int, lower: float, upper: float, *cells: Cells) -> None:
        """Add `count` rows with the same bounds; `cells` count rows from the first of them."""
        first = len(self.lower)
        self._cells += [(first + row, column, value) for row, column, value in cells]
        self.lower += [lower] * count
        self.upper += [upper] * count

    def sparse(self) -> tuple[Integers, Integers, Floats]:
        """Where each row begins, then the columns and the values of all rows."""
        row, column, value = (np.concatenate(part) for part in zip(*self._cells, strict=True))
        order = np.argsort(row, kind="stable")
        begins = np.searchsorted(row[order], np.arange(len(self.lower) + 1))
        return begins, column[order], value[order]


def linear_program(rows: Rows, lower: Floats, upper: Floats) -> Any:
    """HiGHS's model: minimise the first column, with bounds of all columns, [columns]."""
    import highspy

    library: Any = highspy  # partly without types
    model = library.HighsLp()
    model.num_col_, model.num_row_ = len(lower), len(rows.lower)
    model.col_cost_ = np.eye(1, len(lower))[0]
    model.col_lower_, model.col_upper_ = lower, upper
    model.row_lower_, model.row_upper_ = np.array(rows.lower), np.array(rows.upper)
    model.a_matrix_.format_ = library.MatrixFormat.kRowwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = rows.sparse()
    return model


def quiet_solver() -> Any:
    """HiGHS on one thread, without its log."""
    import highspy

    library: Any = highspy
    solver = library.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    return solver
