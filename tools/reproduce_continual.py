"""Continual pretraining, by schedule and replay: see `reproduce.py`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from bench_hdp import to_json
from small_runs import all_corpora, in_parallel, rows, scores, shown, spread, train

from megascale.config.load import whole_number

OLD = "python_stdlib"
SHIFTS = {"weak shift": ("man_pages_en", 0.05), "strong shift": ("man_pages_de", 0.25)}
"""What is learned next, and the part of it that the paper would replay."""
LR, MIN_LR = 4e-3, 4e-4
CONSTANT_LR = (LR + MIN_LR) / 2
CONFIG = """
model: {num_layers: 3, hidden_size: 96, num_heads: 3}
data: {context_tokens: 256, global_batch_tokens: 1536, max_epochs: 4}
planner: {capacity_tokens: 2048}
train: {precision: fp32, threads: 1}
eval: {tokens: 40K}
checkpoint: {save_every_steps: 0}
monitor: {log_every_steps: 50, tensorboard: false}
"""
UNION = "both from scratch"


def continual(options: argparse.Namespace) -> None:
    """Train what everything starts from, then the branches and their rivals from scratch."""
    folder, seeds = options.folder / "continual", range(options.seeds)
    corpora = options.folder / "corpora"
    all_corpora(corpora, [OLD, *(new for new, _ in SHIFTS.values())])
    runs = Runs(folder, corpora, whole_number(options.tokens, "--tokens", least=100_000))
    in_parallel([partial(runs.first, kind, seed) for seed in seeds for kind in FIRST])
    jobs = [(shift, way, seed) for seed in seeds for shift in SHIFTS for way in ways(shift)]
    found = in_parallel([partial(runs.second, *job) for job in jobs])
    by_way: dict[tuple[str, str], list[Path]] = {}
    for (shift, way, _), run in zip(jobs, found, strict=True):
        by_way.setdefault((shift, way), []).append(run)
    results: dict[str, Any] = {"tokens": options.tokens, "seeds": options.seeds}
    results |= {"first": spread([scores(runs.first("cosine", seed))[OLD] for seed in seeds])}
    results |= {"shifts": {shift: _rows(by_way, shift) for shift in SHIFTS}}
    print(*report(results), sep="\n")
    (options.out / "continual.json").write_text(to_json(results), encoding="utf-8")
    plot(results, by_way, options.out / "continual.png")


FIRST: dict[str, dict[str, Any]] = {
    "cosine": {"lr": LR, "min_lr": MIN_LR},
    "infinite": {
        "curve": "infinite",
        "lr": LR,
        "min_lr": MIN_LR,
        "constant_lr": CONSTANT_LR,
        "anneal_tokens": 0,
    },
}
"""The schedules of the first stage; the second is left in its constant phase."""


def ways(shift: str) -> dict[str, tuple[str, dict[str, Any], float]]:
    """Ways to go on: the schedule of the first stage, that of the second, the part replayed."""
    again = {"lr": LR, "min_lr": MIN_LR}
    on = {"curve": "wsd", "lr": CONSTANT_LR, "min_lr": MIN_LR, "warmup_tokens": 0}
    on |= {"anneal_shape": "exponential"}
    share = SHIFTS[shift][1]
    return {
        "not re-warmed": ("cosine", {"curve": "constant", "lr": MIN_LR, "warmup_tokens": 0}, 0.0),
        "re-warmed": ("cosine", again, 0.0),
        "re-warmed, 1 % replay": ("cosine", again, 0.01),
        "re-warmed, 5 % replay": ("cosine", again, 0.05),
        "re-warmed, 25 % replay": ("cosine", again, 0.25),
        f"infinite, {share:.0%} replay".replace("%", " %"): ("infinite", on, share),
        UNION: ("", again, 0.0),
    }


class Runs:
    """The runs of one reproduction, each trained when it is first asked for.

    A stage has `tokens` loss tokens; a run on the union of both corpora twice as many.
    """

    def __init__(self, folder: Path, corpora: Path, tokens: int) -> None:
        self.folder, self.corpora, self.tokens = folder, corpora, tokens

    def first(self, kind: str, seed: int) -> Path:
        """The run_dir of a model of the old data."""
        run = self.folder / f"first-{kind}-{seed}-{self.tokens}"
        train(run, self._config([OLD], self.tokens, FIRST[kind], seed))
        return run

    def second(self, shift: str, way: str, seed: int) -> Path:
        """The run_dir of what goes on with other data, or begins with both."""
        name = "-".join("".join(filter(str.isalnum, word)) for word in (shift, way))
        run = self.folder / f"{name}-{seed}-{self.tokens}"
        before, optim, share = ways(shift)[way]
        new = SHIFTS[shift][0]
        if not before:
            train(run, self._config([OLD, new], 2 * self.tokens, optim, seed))
            return run
        config = self._config([new], self.tokens, optim, seed)
        config["data"]["replay_fraction"] = share
        keep = "keep" if before == "infinite" else "reset"
        config["start"] = {"checkpoint": str(self.first(before, seed)), "optimizer": keep}
        train(run, config)
        return run

    def _config(
        self, sources: Sequence[str], tokens: int, optim: dict[str, Any], seed: int
    ) -> dict[str, Any]:
        config = yaml.safe_load(CONFIG)
        config["data"]["sources"] = {name: {"path": str(self.corpora / name)} for name in sources}
        config["data"]["stages"] = [{"blend": dict.fromkeys(sources, 1.0)}]
        if optim.get("warmup_tokens") is None:
            optim = {**optim, "warmup_tokens": tokens // 20}
        config["eval"]["every_steps"] = tokens // 1536 // 6
        config["train"]["tokens"] = tokens
        return {**config, "optim": optim, "seed": seed}


def _rows(by_way: dict[tuple[str, str], list[Path]], shift: str) -> list[dict[str, Any]]:
    """Bits per byte of each way; the average's distance to the union's is taken seed by seed."""
    new = SHIFTS[shift][0]

    def of(way: str) -> list[tuple[float, float]]:
        return [both(scores(run), new) for run in by_way[shift, way]]

    union = [statistics.fmean(pair) for pair in of(UNION)]
    table = []
    for way in ways(shift):
        pairs = of(way)
        means = [statistics.fmean(pair) for pair in pairs]
        over = [mean / best - 1 for mean, best in zip(means, union, strict=True)]
        row = {"way": way, "old": spread([old for old, _ in pairs])}
        row |= {"new": spread([new for _, new in pairs])}
        table.append(row | {"average": spread(means), "average_over_union": spread(over)})
    return table


def both(found: dict[str, float], new: str) -> tuple[float, float]:
    """The old source's figure and the new one's."""
    return found.get(OLD, found.get(f"replay/{OLD}", float("nan"))), found[new]


def report(results: dict[str, Any]) -> Iterator[str]:
    """The tables, a line each; means over seeds and their range."""
    yield f"stages of {results['tokens']} tokens, {results['seeds']} seeds; bits per byte"
    yield f"{OLD} before: {shown(results['first'])}"
    for shift, table in results["shifts"].items():
        yield f"\n{shift}: {SHIFTS[shift][0]}"
        yield f"{'way':<26}{'old':<22}{'new':<22}{'average':<22}average over union"
        for row in table:
            columns = (f"{shown(row[key]):<22}" for key in ("old", "new", "average"))
            over = row["average_over_union"]
            told = f"{over['mean']:+.1%} ({over['least']:+.1%} to {over['most']:+.1%})"
            yield f"{row['way']:<26}{''.join(columns)}{told}"


def plot(results: dict[str, Any], by_way: dict[tuple[str, str], list[Path]], path: Path) -> None:
    """For each shift the first seed's losses over the second stage, and where all seeds end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panels, (shift, (new, _)) in zip(figure.subplots(2, 3), SHIFTS.items(), strict=True):
        for index, way in enumerate(ways(shift)):
            color = f"C{index}"
            if way != UNION:
                curve = [row for row in rows(by_way[shift, way][0]) if "eval" in row]
                tokens = [row["tokens_seen"] / 1e6 for row in curve]
                for axes, which in zip(panels[:2], (0, 1), strict=True):
                    axes.plot(tokens, [_point(row, new)[which] for row in curve], color=color)
            for number, run in enumerate(by_way[shift, way]):
                label = way if not number else None
                panels[2].plot(*both(scores(run), new), "o", color=color, label=label)
        for axes, title in zip(panels, (f"old: {OLD}", f"new: {new}", "at the end"), strict=True):
            axes.set(title=f"{shift}, {title}", xlabel="tokens of the second stage, millions")
            axes.set_ylabel("held-out bits per byte")
            axes.grid(alpha=0.3)
        panels[2].set(xlabel=f"{OLD}, bits per byte", ylabel=f"{new}, bits per byte")
        panels[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _point(row: dict[str, Any], new: str) -> tuple[float, float]:
    return both({name: score["bits_per_byte"] for name, score in row["eval"].items()}, new)
