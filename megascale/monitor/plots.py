"""The curves of one or more runs as PNG pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.arrays import Floats
from megascale.errors import UserError
from megascale.monitor.experts import plot_shares, read_shares
from megascale.monitor.metric_fields import SCORES, Curve, Picture, drawn_fields, pictures
from megascale.monitor.metrics import METRICS_FILE, has_numbers, read_rows
from megascale.monitor.stragglers import plot_ranks, read_slowdowns
from megascale.runtime.files import real_path
from megascale.runtime.outputs import Output, picture, require_outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = ("#2166ac", "#d6604d", "#1b9e77", "#7b3294", "#e08214", "#4d4d4d", "#c51b7d", "#35978f")
MARKERS = "osD^vPX*"
ALARM = "#c0392b"
DASHES = (0, (4, 2))
STYLE: Any = {
    "agg.path.chunksize": 10_000,
    "axes.axisbelow": True,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.labelcolor": "#404040",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "figure.figsize": (9.0, 5.2),
    "font.size": 10.5,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "xtick.color": "#606060",
    "ytick.color": "#606060",
}


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


def plot_run(run_dirs: Sequence[Path], out: Path) -> list[Path]:
    """Draw the pictures of `monitor.metric_fields` into the folder `out`, of one or more runs.

    And the use of experts and the speed of ranks, a picture for each run that has them. Several
    runs share the axes of each other picture. Returns the files written; a picture is left out
    where no run has what it shows, such as bits per byte without held-out text. Raises UserError
    for a folder that holds no run, for a run with fewer than two recorded steps, and where a
    picture would take the place of another file; OSError where `out` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    names = [real_path(path).name for path in run_dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in run_dirs]
    runs = [load_curves(path, name) for path, name in zip(run_dirs, names, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    chosen = [one for one in pictures() if one.is_always_drawn or _is_shown(one, runs)]
    of_runs = list(_of_runs(run_dirs, runs, out))
    files = [out / f"{one.name}.png" for one in chosen]
    written = files + [path for path, _ in of_runs]
    require_outputs([Output("--out", path, picture(".png")) for path in written])
    with matplotlib.rc_context(STYLE):
        for path, one in zip(files, chosen, strict=True):
            _draw(path, one, runs)
    for path, draw_run in of_runs:
        draw_run(path)
    return written


def _of_runs(
    run_dirs: Sequence[Path], runs: Sequence[Curves], out: Path
) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """(file, how to draw it) of the pictures that show one run each."""
    for run_dir, run in zip(run_dirs, runs, strict=True):
        suffix = f"_{run.name.replace('/', '_')}" if len(runs) > 1 else ""
        found = read_shares(run_dir)
        if found is not None:
            title = f"Use of experts at step {found[0]}"
            yield out / f"experts{suffix}.png", partial(plot_shares, *found[1:], title)
        steps, over = read_slowdowns(run_dir)
        if steps:
            title = "Time of ranks for the same work"
            yield out / f"ranks{suffix}.png", partial(plot_ranks, steps, over, title)


def load_curves(run_dir: Path, name: str) -> Curves:
    """Read a run's metrics; `name` is what its curves are called. Raises UserError."""
    try:
        rows = read_rows(run_dir / METRICS_FILE)
    except OSError as error:
        raise UserError(
            f"{run_dir} holds no readable {METRICS_FILE} ({error.strerror}); "
            "give the run_dir of a run that has trained"
        ) from None
    rows = [row for row in rows if has_numbers(row, "tokens_seen")]
    steps = [row for row in rows if "loss" in row]
    if len(steps) < 2:
        raise UserError(f"{run_dir}: {len(steps)} step(s) recorded so far; a curve needs two")
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
    return np.array([_number(row.get(name)) for row in rows])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _is_scored(scores: Any) -> bool:
    return isinstance(scores, dict) and all(isinstance(one, dict) for one in scores.values())


def _heldout(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Floats]]:
    scores: dict[str, dict[str, Floats]] = {}
    for source in sorted({source for row in rows for source in row["eval"]}):
        seen = [row for row in rows if source in row["eval"]]
        inner = [row["eval"][source] for row in seen]
        scores[source] = {name: _column(inner, name) for name in _drawn_scores()}
        scores[source]["tokens"] = _column(seen, "tokens_seen")
    return scores


def _drawn_scores() -> dict[str, Picture]:
    return {score.name: score.picture for score in SCORES if score.picture is not None}


def _curves_of(picture: Picture) -> Iterator[tuple[str, Curve]]:
    """(field, how it is shown) of a picture."""
    return ((name, one) for name, one in drawn_fields().items() if one.picture == picture)


def _scores_of(picture: Picture) -> Iterator[str]:
    return (name for name, one in _drawn_scores().items() if one == picture)


def _is_shown(picture: Picture, runs: Sequence[Curves]) -> bool:
    """Whether some run has what a picture shows."""
    columns = [run.columns[name] for run in runs for name, _ in _curves_of(picture)]
    scores = [score for run in runs for score in run.heldout.values()]
    columns += [score[name] for score in scores for name in _scores_of(picture)]
    return any(np.isfinite(column).any() for column in columns)


def _draw(path: Path, picture: Picture, runs: list[Curves]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    _draw_curves(axes, list(_curves_of(picture)), runs)
    for name in _scores_of(picture):
        _draw_scores(axes, runs, name)
    _set_values_axis(axes, picture)
    axes.set_title(picture.title if len(runs) > 1 else f"{picture.title} - {runs[0].name}")
    axes.set_xlim(0, max(run.tokens[-1] for run in runs) * 1.02)
    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(length=3)
    _add_steps_axis(axes, runs)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=2 if len(axes.get_legend_handles_labels()[1]) > 6 else 1)
    figure.savefig(path)


def _set_values_axis(axes: Axes, picture: Picture) -> None:
    from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter, StrMethodFormatter

    if picture.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    formatters = {
        "scientific": StrMethodFormatter("{x:.1e}"),
        "engineering": EngFormatter(sep=""),
        "percent": PercentFormatter(xmax=1),
    }
    if picture.numbers in formatters:
        axes.yaxis.set_major_formatter(formatters[picture.numbers])
    if picture.from_zero:
        axes.set_ylim(bottom=0)


def _add_steps_axis(axes: Axes, runs: list[Curves]) -> None:
    """Steps along the top: those of the run that saw the most tokens."""
    longest = max(runs, key=lambda run: run.tokens[-1])
    tokens = np.concatenate([[0.0], longest.tokens, longest.tokens[-1:] * 2])
    steps = np.concatenate([[0.0], longest.step, longest.step[-1:] * 2])
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda values: np.interp(np.asarray(values), tokens, steps),
            lambda values: np.interp(np.asarray(values), steps, tokens),
        ),
    )
    top.set_xlabel("steps" if len(runs) == 1 else f"steps of {longest.name}", fontsize=9)
    top.spines["top"].set_visible(False)
    top.tick_params(length=3, labelsize=9)


def _draw_curves(axes: Axes, curves: list[tuple[str, Curve]], runs: list[Curves]) -> None:
    """The fields of a picture: of several runs the colour tells the run, else the field."""
    marks = [(name, curve) for name, curve in curves if curve.style == "marks"]
    lines = [(name, curve) for name, curve in curves if curve.style != "marks"]
    several = len(runs) > 1
    for position, run in enumerate(runs):
        for order, (name, curve) in enumerate(lines):
            values = run.columns[name] - curve.minus
            if np.isfinite(values).any():
                line = "solid" if order == 0 else DASHES
                look = {"color": _colour(position if several else order), "linestyle": line}
                label = _label(curve, values, run.name if several else "")
                _draw_curve(axes, run.tokens, values, curve.style, label, look)
    for name, curve in marks:
        places = np.concatenate([run.tokens[run.columns[name] == 1] for run in runs])
        for index, tokens in enumerate(places):
            label = f"{len(places)} {curve.label}" if index == 0 else ""
            axes.axvline(tokens, color=ALARM, linewidth=0.9, alpha=0.7, label=label or None)


def _draw_curve(
    axes: Axes, tokens: Floats, values: Floats, style: str, label: str, look: dict[str, Any]
) -> None:
    if style == "trend":
        axes.plot(tokens, values, **look, alpha=0.28, linewidth=0.9)
    shown = values if style == "line" else smooth(values)
    axes.plot(tokens, shown, **look, linewidth=2.0, label=label or None)


def _label(curve: Curve, values: Floats, run: str) -> str:
    """What the legend calls a curve; `run` is empty where it is the only one."""
    own = curve.label or ("smoothed" if curve.style == "trend" and not run else "")
    parts = [": ".join(filter(None, (run, own)))]
    if curve.summary is not None:
        parts.append(curve.summary(values[np.isfinite(values)]))
    return ", ".join(filter(None, parts))


def _draw_scores(axes: Axes, runs: list[Curves], column: str) -> None:
    """Held-out scores: of several runs the colour tells the run, else the source."""
    sources = sorted({source for run in runs for source in run.heldout})
    for position, run in enumerate(runs):
        for source, score in run.heldout.items():
            place = sources.index(source)
            several = len(runs) > 1
            colour = _colour(position if several else place + 1)
            label = f"held-out {source}, last {_last(score[column])}"
            axes.plot(
                score["tokens"],
                score[column],
                color=colour,
                marker=MARKERS[place % len(MARKERS)],
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linewidth=1.1,
                linestyle=DASHES,
                zorder=4,
                label=f"{run.name}: {label}" if several else label,
            )


def _last(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    return f"{finite[-1]:.3f}" if len(finite) else "n/a"


def _colour(position: int) -> str:
    return COLOURS[position % len(COLOURS)]
