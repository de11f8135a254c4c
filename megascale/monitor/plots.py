"""The curves of one or more runs as PNG pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.arrays import Floats
from megascale.monitor.experts import plot_shares, read_shares
from megascale.monitor.metric_fields import Curve, Picture, drawn_fields, pictures
from megascale.monitor.plot_style import (
    ALARM,
    DASHES,
    EARLIER,
    MARKERS,
    STYLE,
    colour,
    count_units,
    short_rate,
)
from megascale.monitor.quantities import show_names
from megascale.monitor.run_curves import (
    Curves,
    DrawnRun,
    EarlierPart,
    drawn_scores,
    go_on_from,
    load_curves,
    smooth,
    source_names,
)
from megascale.monitor.stragglers import plot_ranks, read_slowdowns
from megascale.runtime.files import real_path
from megascale.runtime.outputs import Output, picture, require_outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator


def plot_run(
    run_dirs: Sequence[Path],
    out: Path,
    earlier: Mapping[Path, Sequence[EarlierPart]] | None = None,
) -> list[Path]:
    """Draw the pictures of `monitor.metric_fields` into the folder `out`, of one or more runs.

    And the use of experts and the speed of ranks, a picture for each run that has them. Several
    runs share the axes of each other picture. `earlier` has what each run goes on from, oldest
    first: the curves of these stand before its own. Returns the files written; a picture is left
    out where no run has what it shows, such as bits per byte without held-out text. Raises
    UserError for a folder that holds no run, for a run with fewer than two recorded steps, and
    where a picture would take the place of another file; OSError where `out` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    names = [real_path(path).name for path in run_dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in run_dirs]
    before = earlier or {}
    runs = [
        go_on_from(before.get(path, ()), load_curves(path, name))
        for path, name in zip(run_dirs, names, strict=True)
    ]
    view = _View(runs, run_dirs)
    out.mkdir(parents=True, exist_ok=True)
    chosen = [one for one in pictures() if one.is_always_drawn or _is_shown(one, view.own)]
    of_runs = list(_of_runs(run_dirs, names, out))
    files = [out / f"{one.name}.png" for one in chosen]
    written = files + [path for path, _ in of_runs]
    require_outputs([Output("--out", path, picture(".png")) for path in written])
    with matplotlib.rc_context(STYLE):
        for path, one in zip(files, chosen, strict=True):
            _draw(path, one, view)
    for path, draw_run in of_runs:
        draw_run(path)
    return written


class _View:
    """The runs of a picture, and what came before them."""

    def __init__(self, runs: Sequence[DrawnRun], run_dirs: Sequence[Path]) -> None:
        self.own = [run.own for run in runs]
        self.earlier = _earlier_once(runs, {real_path(path) for path in run_dirs})
        self.branches = sorted(
            {max(one.tokens[-1] for one in run.earlier.values()) for run in runs if run.earlier}
        )
        """Tokens at which runs went on from others."""
        names = (name for path in run_dirs for name in source_names(path))
        self.corpora = show_names(list(dict.fromkeys(names)))

    @property
    def is_single(self) -> bool:
        """Whether one run is drawn, so that a colour tells the field."""
        return len(self.own) == 1

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last tokens that are shown."""
        first = min((*self.own, *self.earlier), key=lambda one: one.tokens[0])
        is_cut = bool(self.earlier) and first.step[0] > 1
        return first.tokens[0] if is_cut else 0.0, max(one.tokens[-1] for one in self.own)


def _earlier_once(runs: Sequence[DrawnRun], drawn: set[Path]) -> list[Curves]:
    """What came before the runs, without those that are drawn themselves; of each the longest."""
    found: dict[Path, Curves] = {}
    for run in runs:
        for folder, curves in run.earlier.items():
            if real_path(folder) in drawn:
                continue
            if folder not in found or len(found[folder].step) < len(curves.step):
                found[folder] = curves
    return list(found.values())


def _of_runs(
    run_dirs: Sequence[Path], names: Sequence[str], out: Path
) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """(file, how to draw it) of the pictures that show one run each."""
    for run_dir, name in zip(run_dirs, names, strict=True):
        suffix = f"_{name.replace('/', '_')}" if len(names) > 1 else ""
        found = read_shares(run_dir)
        if found is not None:
            title = f"Use of experts at step {found[0]:,} - {name}"
            yield out / f"experts{suffix}.png", partial(plot_shares, *found[1:], title)
        steps, over = read_slowdowns(run_dir)
        if steps:
            title = f"Time of ranks for the same work - {name}"
            yield out / f"ranks{suffix}.png", partial(plot_ranks, steps, over, title)


def _curves_of(picture: Picture) -> Iterator[tuple[str, Curve]]:
    """(field, how it is shown) of a picture."""
    return ((name, one) for name, one in drawn_fields().items() if one.picture == picture)


def _scores_of(picture: Picture) -> Iterator[str]:
    return (name for name, one in drawn_scores().items() if one == picture)


def _is_shown(picture: Picture, runs: Sequence[Curves]) -> bool:
    """Whether some run has what a picture shows."""
    columns = [run.columns[name] for run in runs for name, _ in _curves_of(picture)]
    scores = [score for run in runs for score in run.heldout.values()]
    columns += [score[name] for score in scores for name in _scores_of(picture)]
    return any(np.isfinite(column).any() for column in columns)


def _draw(path: Path, picture: Picture, view: _View) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    _draw_earlier(axes, picture, view)
    _draw_curves(axes, list(_curves_of(picture)), view)
    for name in _scores_of(picture):
        _draw_scores(axes, view, name)
    _set_values_axis(axes, picture)
    _set_titles(axes, picture, view)
    first, last = view.ends
    axes.set_xlim(first, last + 0.02 * (last - first))
    axes.set_xlabel("tokens seen" + ", those of earlier runs included" * bool(view.branches))
    axes.xaxis.set_major_formatter(count_units())
    axes.tick_params(length=3)
    _add_steps_axis(axes, view)
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        axes.legend(ncols=2 if len(labels) > 6 else 1)
    figure.savefig(path)


def _set_titles(axes: Axes, picture: Picture, view: _View) -> None:
    """What is shown, of which run, and under it what the run reads."""
    name = f" - {view.own[0].name}" if view.is_single else ""
    title = axes.figure.suptitle(f"{picture.title}{name}", x=0.01, ha="left")
    title.set(fontsize=14, fontweight="bold")
    if view.corpora:
        axes.set_title(f"trained on {view.corpora}", fontsize=10, fontweight="normal", pad=8)


def _set_values_axis(axes: Axes, picture: Picture) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter

    if picture.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_round_log_ticks(*axes.get_ylim()))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if picture.numbers == "scientific":
        axes.yaxis.set_major_formatter(lambda value, _: short_rate(value))
    elif picture.numbers == "engineering":
        axes.yaxis.set_major_formatter(count_units())
    elif picture.numbers == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    if picture.from_zero:
        axes.set_ylim(bottom=0)


def _round_log_ticks(low: float, high: float) -> Locator:
    """1, 2 and 5 times powers of ten; round numbers between them where fewer than three are in
    the range."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    ticks = LogLocator(subs=(1, 2, 5))
    shown = [tick for tick in ticks.tick_values(low, high) if low <= tick <= high]
    if len(shown) >= 3:
        return ticks
    return MaxNLocator(5, steps=[1, 2, 5, 10])


def _add_steps_axis(axes: Axes, view: _View) -> None:
    """Steps along the top: those of the run that saw the most tokens."""
    longest = max(view.own, key=lambda run: run.tokens[-1])
    before = view.earlier if view.is_single else []
    seen = [one.tokens for one in (*before, longest)]
    done = [one.step for one in (*before, longest)]
    tokens = np.concatenate([[0.0], *seen, longest.tokens[-1:] * 2])
    steps = np.concatenate([[0.0], *done, longest.step[-1:] * 2])
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda values: np.interp(np.asarray(values), tokens, steps),
            lambda values: np.interp(np.asarray(values), steps, tokens),
        ),
    )
    top.set_xlabel("steps" if view.is_single else f"steps of {longest.name}", fontsize=9)
    top.spines["top"].set_visible(False)
    top.tick_params(length=3, labelsize=9)


def _draw_earlier(axes: Axes, picture: Picture, view: _View) -> None:
    """The curves of the runs that were gone on from: grey, up to a line where a branch begins."""
    for run in view.earlier:
        label = f"before: {run.name}"
        for name, curve in _curves_of(picture):
            values = run.columns[name] - curve.minus
            if curve.style != "marks" and np.isfinite(values).any():
                look = {"color": EARLIER, "linestyle": "solid"}
                _draw_curve(axes, run.tokens, values, curve.style, label, look)
                label = ""
        for name in _scores_of(picture):
            for score in run.heldout.values():
                axes.plot(
                    score["tokens"], score[name], color=EARLIER, linestyle=DASHES, linewidth=1.1,
                    marker=".", label=label or None,
                )  # fmt: skip
                label = ""
    for index, tokens in enumerate(view.branches):
        label = "branch" if index == 0 else ""
        axes.axvline(tokens, color=EARLIER, linestyle="dotted", linewidth=1.4, label=label or None)


def _draw_curves(axes: Axes, curves: list[tuple[str, Curve]], view: _View) -> None:
    """The fields of a picture: of several runs the colour tells the run, else the field."""
    runs, is_named = view.own, bool(view.branches) or not view.is_single
    marks = [(name, curve) for name, curve in curves if curve.style == "marks"]
    lines = [(name, curve) for name, curve in curves if curve.style != "marks"]
    for position, run in enumerate(runs):
        for order, (name, curve) in enumerate(lines):
            values = run.columns[name] - curve.minus
            if np.isfinite(values).any():
                line = "solid" if order == 0 else DASHES
                place = order if view.is_single else position
                look = {"color": colour(place), "linestyle": line}
                label = _label(curve, values, run.name if is_named else "")
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
    """What the legend calls a curve; `run` is empty where nothing else is drawn."""
    own = curve.label or ("smoothed" if curve.style == "trend" and not run else "")
    parts = [": ".join(filter(None, (run, own)))]
    if curve.summary is not None:
        parts.append(curve.summary(values[np.isfinite(values)]))
    return ", ".join(filter(None, parts))


def _draw_scores(axes: Axes, view: _View, column: str) -> None:
    """Held-out scores: of several runs the colour tells the run, else the source."""
    sources = sorted({source for run in view.own for source in run.heldout})
    for position, run in enumerate(view.own):
        for source, score in run.heldout.items():
            place = sources.index(source)
            label = f"held-out {source}, last {_last(score[column])}"
            axes.plot(
                score["tokens"],
                score[column],
                color=colour(place + 1 if view.is_single else position),
                marker=MARKERS[place % len(MARKERS)],
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linewidth=1.1,
                linestyle=DASHES,
                zorder=4,
                label=label if view.is_single else f"{run.name}: {label}",
            )


def _last(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    return f"{finite[-1]:.3f}" if len(finite) else "n/a"
