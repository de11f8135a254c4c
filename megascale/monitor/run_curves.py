"""What a run recorded, as arrays, with what the runs did that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megascale.arrays import Booleans, Floats
from megascale.config import load_config
from megascale.errors import UserError
from megascale.monitor.metric_fields import SCORES, Picture, drawn_fields
from megascale.monitor.metrics import METRICS_FILE, has_numbers, read_rows
from megascale.runtime.files import real_path


@dataclass(frozen=True)
class Curves:
    """What a run recorded; arrays of one entry per step, NaN where nothing finite was seen."""

    name: str
    step: Floats
    tokens: Floats
    columns: dict[str, Floats]
    """The fields that pictures show; all NaN where the run does not have one."""
    heldout: dict[str, dict[str, Floats]]
    """Source to arrays: tokens, and the scores that pictures show; an entry per evaluation."""

    def until(self, step: int) -> Curves:
        """Without the steps after `step`, and what was scored after them."""
        kept = self.step <= step
        last = self.tokens[kept].max(initial=-np.inf)
        return self._of(kept, {name: one["tokens"] <= last for name, one in self.heldout.items()})

    def since(self, tokens: float) -> Curves:
        """Without what was before so many tokens."""
        scored = {name: one["tokens"] >= tokens for name, one in self.heldout.items()}
        return self._of(self.tokens >= tokens, scored)

    def _of(self, kept: Booleans, scored: Mapping[str, Booleans]) -> Curves:
        return replace(
            self,
            step=self.step[kept],
            tokens=self.tokens[kept],
            columns={name: column[kept] for name, column in self.columns.items()},
            heldout={
                source: {name: values[scored[source]] for name, values in score.items()}
                for source, score in self.heldout.items()
            },
        )

    def after(self, steps: float, tokens: float) -> Curves:
        """The same where so many steps and tokens were seen before."""
        heldout = {
            source: {**score, "tokens": score["tokens"] + tokens}
            for source, score in self.heldout.items()
        }
        return replace(self, step=self.step + steps, tokens=self.tokens + tokens, heldout=heldout)


@dataclass(frozen=True)
class EarlierPart:
    """What a run was before another run went on from its checkpoint."""

    folder: Path
    step: int
    """Of the checkpoint."""


@dataclass(frozen=True)
class DrawnRun:
    """A run, and what came before it; steps and tokens count from the first of all."""

    own: Curves
    earlier: Mapping[Path, Curves]
    """By folder, oldest first."""


def load_curves(run_dir: Path, name: str) -> Curves:
    """Read a run's metrics; `name` is what its curves are called. Raises UserError."""
    try:
        curves = _read_curves(run_dir, name)
    except OSError as error:
        raise UserError(
            f"{run_dir} holds no readable {METRICS_FILE} ({error.strerror}); "
            "give the run_dir of a run that has trained"
        ) from None
    steps = len(curves.step)
    if steps < 2:
        raise UserError(f"{run_dir}: {steps} step(s) recorded so far; a curve needs two")
    return curves


def go_on_from(parts: Sequence[EarlierPart], own: Curves) -> DrawnRun:
    """A run with the curves of earlier ones before its own.

    `parts` are oldest first; those without readable metrics are left out. Of what came before, no
    more tokens are shown than the run itself has seen: it would be too small to see.
    """
    steps = tokens = 0.0
    earlier: dict[Path, Curves] = {}
    for part in parts:
        try:
            curves = _read_curves(part.folder, part.folder.name).until(part.step)
        except OSError:
            continue
        if len(curves.step):
            earlier[part.folder] = curves.after(steps, tokens)
            steps, tokens = steps + curves.step[-1], tokens + curves.tokens[-1]
    first = tokens - own.tokens[-1]
    shown = {folder: curves.since(first) for folder, curves in earlier.items()}
    shown = {folder: curves for folder, curves in shown.items() if len(curves.step)}
    return DrawnRun(own.after(steps, tokens), shown)


def source_names(run_dir: Path) -> list[str]:
    """The sources that a run reads; empty where its config is not there, or cannot be read."""
    try:
        return list(load_config(real_path(run_dir) / "config.yaml").data.sources)
    except (UserError, OSError):
        return []


def _read_curves(run_dir: Path, name: str) -> Curves:
    """Read a run's metrics, of any number of steps. Raises OSError."""
    rows = [row for row in read_rows(run_dir / METRICS_FILE) if has_numbers(row, "tokens_seen")]
    steps = [row for row in rows if "loss" in row]
    return Curves(
        name=name,
        step=_column(steps, "step"),
        tokens=_column(steps, "tokens_seen"),
        columns={column: _column(steps, column) for column in drawn_fields()},
        heldout=_heldout([row for row in rows if _is_scored(row.get("eval"))]),
    )


def smooth(values: Floats) -> Floats:
    """Running mean over about a thirtieth of the run, taken twice; NaN entries are passed over.

    The window is centred, and narrows towards the start, so the steep first steps neither lag
    nor vanish; at the end it is cut off, because a single last step is mostly noise.
    """
    half = len(values) // 60
    return _running_mean(_running_mean(values, half), half)


def _running_mean(values: Floats, half: int) -> Floats:
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    begin, end = index - reach, np.minimum(len(values), index + reach + 1)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    seen = counts[end] - counts[begin]
    means = (sums[end] - sums[begin]) / np.maximum(seen, 1)
    return np.where(seen > 0, means, np.nan)


def _column(rows: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array([_number(row.get(name)) for row in rows], dtype=np.float64)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _is_scored(scores: Any) -> bool:
    return isinstance(scores, dict) and all(isinstance(one, dict) for one in scores.values())


def _heldout(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Floats]]:
    scores: dict[str, dict[str, Floats]] = {}
    for source in sorted({source for row in rows for source in row["eval"]}):
        seen = [row for row in rows if source in row["eval"]]
        inner = [row["eval"][source] for row in seen]
        scores[source] = {name: _column(inner, name) for name in drawn_scores()}
        scores[source]["tokens"] = _column(seen, "tokens_seen")
    return scores


def drawn_scores() -> dict[str, Picture]:
    """The picture of each held-out score that has one."""
    return {score.name: score.picture for score in SCORES if score.picture is not None}
