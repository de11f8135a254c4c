"""From measured micro-batches to the coefficients of a cost model, and how far it is off."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Booleans, Floats
from megascale.planner.cost import CostModel
from megascale.runtime.files import write_output

COEFFICIENTS = ("b", "a", "fixed", "latency", "transfer_intra", "transfer_inter")
"""What enters the time linearly, the most useful first: where measurements cannot tell some of
them apart, the first of those explains them all."""
GOOD_ERROR = 0.06
"""Relative error below which FlexSP calls its cost model accurate."""
_INDEPENDENT = 1e-3
"""A column is unidentifiable when less than this part of it is left beside the others."""
_FALSE_PASS = 0.01
"""Most of the fits that may find a `pass_` term in measurements of a model that has none."""
_EXACT = 1e-9
"""Relative error below which a prediction counts as exact, so that rounding is not noise."""
_REFINEMENTS = 24
"""Steps in which a ratio that was found is refined between its neighbours."""
_MOST_RATIOS = 12
_ROUNDS = 12


@dataclass(frozen=True)
class Measurement:
    """One micro-batch as it was run, forward and backward."""

    lengths: tuple[int, ...]
    """Tokens of its sequences; none for an empty micro-batch."""
    size: int
    """Ranks of the ring."""
    one_node: bool
    """The ring lies within a node."""
    seconds: tuple[float, ...]
    """Time of the slowest rank of the ring, once per repeat."""

    @property
    def noise(self) -> float:
        """Median distance of a repeat from the median, relative."""
        return float(np.median(np.abs(np.array(self.seconds) / np.median(self.seconds) - 1)))


@dataclass(frozen=True)
class Fit:
    """A cost model and how well it tells the measurements; arrays have one entry for each."""

    cost: CostModel
    measured_s: Floats
    predicted_s: Floats
    left_out_s: Floats
    """Predicted by the model that is fitted to all the others."""
    unidentified: tuple[str, ...]
    """Coefficients that the measurements cannot tell; 0 in `cost`, but for what is copied."""
    copied: tuple[str, ...]
    """`_inter` coefficients that no ring measured, taken from rings within a node."""

    @property
    def errors(self) -> Floats:
        """Relative errors of the prediction; above 0 where it is too long."""
        return self.predicted_s / self.measured_s - 1

    @property
    def left_out_errors(self) -> Floats:
        """Relative errors of what is predicted from the other measurements."""
        return self.left_out_s / self.measured_s - 1

    @property
    def is_good(self) -> bool:
        """The median error, measurements left out one by one, is what FlexSP reports."""
        return bool(np.median(np.abs(self.left_out_errors)) < GOOD_ERROR)


def fit_cost(measurements: Sequence[Measurement], node_size: int, quantile: float = 0.5) -> Fit:
    """The cost model, with no coefficient below 0, of the least relative error.

    What it aims at is the `quantile` of the repeats: 0.5 their median, 0 the fastest. Single
    measurements that are far off, as other programs cause them, count less than by their square.
    For a given ratio of `pass` to `a` the time is linear in what is left, so the ratios are tried
    one by one. A ratio above 0 needs evidence: see `_best_ratios`. A coefficient that the
    measurements cannot tell is 0 and named. Raises ValueError without a measurement that took time.
    """
    table = _Table.of(measurements, quantile)
    ratios = _best_ratios(table)
    identified = _identified(table.columns(ratios) / table.seconds[:, None])
    found = _solve(table, ratios).found
    cost = _cost(found, ratios, node_size)
    left_out = np.empty(len(measurements))
    everything = np.arange(len(measurements))
    for one in everything:
        rest = _solve(table.rows(everything != one), ratios).found
        left_out[one] = table.columns(ratios)[one] @ rest
    unidentified = [name for name, known in zip(COEFFICIENTS, identified, strict=True) if not known]
    cost, copied = _copied(cost, table)
    return Fit(
        cost=cost,
        measured_s=table.seconds,
        predicted_s=table.columns(ratios) @ found,
        left_out_s=left_out,
        unidentified=tuple(name for name in unidentified if name not in copied),
        copied=copied,
    )


def least_squares_not_negative(matrix: ArrayLike, target: ArrayLike) -> Floats:
    """The x >= 0 that minimises |matrix @ x - target|; zero columns get 0.

    Lawson and Hanson, Solving Least Squares Problems, algorithm NNLS.
    """
    columns, wanted = np.asarray(matrix, np.float64), np.asarray(target, np.float64)
    scale = np.linalg.norm(columns, axis=0)
    scaled = columns / np.where(scale > 0, scale, 1.0)
    x, active = np.zeros(len(scale)), np.zeros(len(scale), dtype=bool)
    limit = 1e-12 * max(1.0, float(np.linalg.norm(wanted)))
    for _ in range(10 * len(scale)):
        slope = scaled.T @ (wanted - scaled @ x)
        slope[active] = 0.0
        if slope.max(initial=0.0) <= limit:
            break
        active[slope.argmax()] = True
        x, active = _step_inside(scaled, wanted, x, active)
    return x / np.where(scale > 0, scale, 1.0)


def _step_inside(
    scaled: Floats, wanted: Floats, x: Floats, active: Booleans
) -> tuple[Floats, Booleans]:
    """Towards the least squares of the active columns, as far as nothing falls below 0."""
    while True:
        best = np.zeros_like(x)
        best[active] = np.linalg.lstsq(scaled[:, active], wanted, rcond=None)[0]
        falling = active & (best <= 0)
        if not falling.any():
            return best, active
        reach = x[falling] / (x[falling] - best[falling] + 1e-300)
        x = x + reach.min() * (best - x)
        blocking = np.zeros_like(active)
        blocking[np.flatnonzero(falling)[reach <= reach.min()]] = True
        active = active & ~blocking
        x = np.where(active, x, 0.0)


@dataclass(frozen=True)
class _Table:
    """Measurements as arrays."""

    squares: Floats
    tokens: Floats
    size: Floats
    one_node: Booleans
    seconds: Floats

    @staticmethod
    def of(measurements: Sequence[Measurement], quantile: float) -> _Table:
        repeats = [one.seconds for one in measurements]
        seconds = np.array([np.quantile(one, quantile) for one in repeats], np.float64)
        if not len(seconds) or not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError("a fit needs measurements of more than 0 s")
        lengths = [np.array(one.lengths, np.float64) for one in measurements]
        return _Table(
            squares=np.array([(tokens * tokens).sum() for tokens in lengths]),
            tokens=np.array([tokens.sum() for tokens in lengths]),
            size=np.array([one.size for one in measurements], np.float64),
            one_node=np.array([one.one_node for one in measurements], dtype=bool),
            seconds=seconds,
        )

    def rows(self, chosen: Booleans) -> _Table:
        return _Table(
            self.squares[chosen],
            self.tokens[chosen],
            self.size[chosen],
            self.one_node[chosen],
            self.seconds[chosen],
        )

    def columns(self, ratios: tuple[float, float]) -> Floats:
        """What each coefficient is multiplied with, (measurements, coefficients).

        With pass = ratio * a, attention and what it does not hide of the passing take
        a * max(sum(s^2), ratio * sum(s) * (d - 1)) / d.
        """
        ratio = np.where(self.one_node, *ratios) * (self.size > 1)
        exposed = np.maximum(self.squares, ratio * self.tokens * (self.size - 1))
        held, shared = self.tokens / self.size, self.size > 1
        return np.stack(
            [
                held,
                exposed / self.size,
                np.ones_like(held),
                np.log2(self.size),
                held * (shared & self.one_node),
                held * (shared & ~self.one_node),
            ],
            axis=1,
        )

    @property
    def crosses(self) -> bool:
        """Some ring crosses nodes."""
        return bool((~self.one_node & (self.size > 1)).any())


def _best_ratios(table: _Table) -> tuple[float, float]:
    """Ratios of `pass` to `a`, in tokens, within a node and across; 0 without evidence.

    The evidence is the F-test of nested models (Draper and Smith, Applied Regression Analysis): how
    much smaller must the sum of squared errors be with the ratios than without, given how far the
    measurements scatter about the model? Let n measurements leave v = n - k degrees of freedom to k
    coefficients and ratios. If there is no `pass_` term and the errors are normal, the probability
    is x^(v/2) that two needless ratios leave less than a part x of the sum; for one ratio it is
    smaller. (1 / (1 + 2 F / v) has a beta distribution.) As the best of many ratios is taken, the
    probability is shared among them (Bonferroni).
    """
    candidates = _candidates(table)
    known = int(_identified(table.columns(candidates[0]) / table.seconds[:, None]).sum())
    bend = _solve(table, candidates[0]).bend
    floor = len(table.seconds) * _EXACT**2

    def loss(ratios: tuple[float, float]) -> float:
        return max(floor, _solve(table, ratios, bend).loss)

    def score(ratios: tuple[float, float]) -> float:
        extra = sum(ratio > 0 for ratio in ratios)
        freedom = len(table.seconds) - known - extra
        if not extra:
            return loss(ratios)
        if freedom <= 0:
            return math.inf
        return loss(ratios) / math.pow(_FALSE_PASS / len(candidates), 2 / freedom)

    best = min(candidates, key=score)
    for place in (0, 1):
        if best[place] > 0:
            best = _refined(loss, best, place, sorted({pair[place] for pair in candidates}))
    return best


def _refined(
    loss: Callable[[tuple[float, float]], float],
    ratios: tuple[float, float],
    place: int,
    options: list[float],
) -> tuple[float, float]:
    """`ratios` with one of them moved to the least loss between its neighbours in `options`.

    Golden-section search.
    """
    at = options.index(ratios[place])
    low, high = options[at - 1], options[min(at + 1, len(options) - 1)]
    golden = (5**0.5 - 1) / 2

    def moved(ratio: float) -> tuple[float, float]:
        return (ratio, ratios[1]) if place == 0 else (ratios[0], ratio)

    for _ in range(_REFINEMENTS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(moved(left)) <= loss(moved(right)):
            high = right
        else:
            low = left
    return min(ratios, moved((low + high) / 2), key=loss)


def _candidates(table: _Table) -> list[tuple[float, float]]:
    """Ratios of `pass` to `a`, in tokens, within a node and across; (0, 0) first.

    Between two neighbours the same measurements are exposed.
    """
    options = []
    for inside in (True, False):
        chosen = (table.size > 1) & (table.one_node == inside) & (table.tokens > 0)
        hidden = (table.squares / np.maximum(table.tokens, 1))[chosen] / (table.size[chosen] - 1)
        between = np.unique(hidden) * 1.0001
        if len(between) > _MOST_RATIOS:
            between = np.quantile(between, np.linspace(0, 1, _MOST_RATIOS))
        options.append([0.0, *between.tolist()])
    return list(product(*options))


class _Solved(NamedTuple):
    """Coefficients for given ratios of `pass` to `a`."""

    found: Floats
    loss: float
    """Sum of squared relative errors, the square cut to a line above `bend`."""
    bend: float


def _solve(table: _Table, ratios: tuple[float, float], bend: float | None = None) -> _Solved:
    """The coefficients of the least loss.

    Iterated re-weighting for Huber's loss, bent at 2 median errors unless `bend` is given. Losses
    can be compared only where the bend is the same.
    """
    columns = table.columns(ratios) / table.seconds[:, None]
    known = _identified(columns)
    found, weight = np.zeros(columns.shape[1]), np.ones(len(columns))
    loss, bent = np.inf, bend or 0.0
    for _ in range(_ROUNDS if len(columns) else 0):
        root = np.sqrt(weight)
        found[known] = least_squares_not_negative(columns[:, known] * root[:, None], root)
        error = np.abs(columns @ found - 1)
        bent = bend or max(2 * float(np.median(error)), _EXACT)
        squares = np.where(error <= bent, error**2, bent * (2 * error - bent))
        before, loss = loss, float(squares.sum())
        if abs(before - loss) <= 1e-6 * loss:
            break
        weight = np.minimum(1.0, bent / np.maximum(error, 1e-12))
    return _Solved(found, loss, bent)


def _identified(columns: Floats) -> Booleans:
    """Which columns the others before them do not explain."""
    known = np.zeros(columns.shape[1], dtype=bool)
    for index, column in enumerate(columns.T):
        others = columns[:, known]
        rest = column - others @ np.linalg.lstsq(others, column, rcond=None)[0]
        known[index] = np.linalg.norm(rest) > _INDEPENDENT * np.linalg.norm(column)
    return known


def _cost(found: Floats, ratios: tuple[float, float], node_size: int) -> CostModel:
    values = dict(zip(COEFFICIENTS, found.tolist(), strict=True))
    passing = {"pass_intra": ratios[0] * values["a"], "pass_inter": ratios[1] * values["a"]}
    again = {"prefix_intra": values["transfer_intra"], "prefix_inter": values["transfer_inter"]}
    return CostModel(**values, **passing, **again, node_size=node_size)


def _copied(cost: CostModel, table: _Table) -> tuple[CostModel, tuple[str, ...]]:
    if table.crosses:
        return cost, ()
    cost = replace(
        cost,
        transfer_inter=cost.transfer_intra,
        pass_inter=cost.pass_intra,
        prefix_inter=cost.prefix_intra,
    )
    return cost, ("transfer_inter", "pass_inter")


def write_cost(cost: CostModel, path: str | Path) -> None:
    """Write a COST.json that `CostModel.load` reads. Raises OSError."""
    value = asdict(cost)
    del value["calibrated"]
    write_output(Path(path), json.dumps(value, indent=1) + "\n")


def fit_table(measurements: Sequence[Measurement], fit: Fit) -> list[str]:
    """Measured against predicted, a line for each measurement."""
    rows = ["  ring  sequences              measured   noise  predicted   error  left out"]
    for one, seconds, predicted, error, left_out in zip(
        measurements,
        fit.measured_s,
        fit.predicted_s,
        fit.errors,
        fit.left_out_errors,
        strict=True,
    ):
        what = f"{one.size:>4}  {_words(one.lengths):<20} {seconds * 1e3:>8.2f} ms"
        found = f"{one.noise:>6.1%} {predicted * 1e3:>7.2f} ms {error:>+7.1%}  {left_out:>+7.1%}"
        rows.append(f"  {what} {found}{'' if one.one_node else '  across nodes'}")
    return rows


def _words(lengths: tuple[int, ...]) -> str:
    if not lengths:
        return "none"
    if len(set(lengths)) == 1:
        return f"{len(lengths):,} x {lengths[0]:,}"
    return f"{len(lengths):,} of {min(lengths):,} to {max(lengths):,}"
