"""Figures of a whole run, from its metrics: held-out scores, and what its plans were worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megascale.monitor.metric_fields import SPEEDUP
from megascale.monitor.metrics import METRICS_FILE, has_numbers, read_rows

Score = Mapping[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """The first and the last score of a source's held-out set, which are of the same part of it."""

    source: str
    first: Score
    last: Score
    step: int
    """Of the last one."""


@dataclass(frozen=True)
class Speedup:
    """Predicted step time of static context parallelism over that of the plans, of all steps."""

    median: float
    least: float
    most: float
    steps: int
    """That have such a figure."""


@dataclass(frozen=True)
class RunFigures:
    """What `read_figures` finds."""

    heldout: tuple[HeldOut, ...] = ()
    speedup: Speedup | None = None


def read_figures(run_dir: Path) -> RunFigures:
    """The figures of a run; without any where it has no metrics that can be read."""
    try:
        rows = read_rows(run_dir / METRICS_FILE)
    except OSError:
        return RunFigures()
    return RunFigures(tuple(_heldout(rows)), _speedup(rows))


def _heldout(rows: Sequence[Mapping[str, Any]]) -> Iterator[HeldOut]:
    """The scores of each source, in the order in which sources were scored first."""
    scores: dict[str, list[tuple[int, Score]]] = {}
    for row in rows:
        evaluation = row.get("eval")
        for source, score in evaluation.items() if isinstance(evaluation, dict) else ():
            if isinstance(score, dict) and has_numbers(score, "loss"):
                scores.setdefault(source, []).append((row["step"], score))
    for source, found in scores.items():
        step, last = found[-1]
        alike = (score for _, score in found if _part(score) == _part(last))
        yield HeldOut(source, next(alike), last, step)


def _part(score: Score) -> object:
    """What tells which part of a set was scored; earlier versions counted its tokens alone."""
    return score.get("part", score.get("tokens"))


def _speedup(rows: Sequence[Mapping[str, Any]]) -> Speedup | None:
    found = [float(row[SPEEDUP]) for row in rows if has_numbers(row, SPEEDUP)]
    if not found:
        return None
    return Speedup(median(found), min(found), max(found), len(found))
