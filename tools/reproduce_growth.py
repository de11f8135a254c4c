"""Growing a model against training it from scratch: see `reproduce.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_hdp import to_json
from small_runs import all_corpora, in_parallel, rows, shown, spread, train

from megascale.config import finalize, parse_config
from megascale.config.load import whole_number
from megascale.model.counts import batch_flops

CORPUS, CONTEXT, LAYERS, FACTOR = "python_stdlib", 256, 8, 4
CONFIG = f"""
model: {{hidden_size: 96, num_heads: 3}}
data: {{context_tokens: {CONTEXT}, global_batch_tokens: 1536}}
planner: {{capacity_tokens: 2048}}
optim: {{lr: 3.0e-3}}
train: {{precision: fp32, threads: 1}}
eval: {{tokens: 60K}}
checkpoint: {{save_every_steps: 0}}
monitor: {{log_every_steps: 50, tensorboard: false}}
"""
SCRATCH = "from scratch"
WAYS: dict[str, tuple[str, float]] = {
    "stack at 10 %": ("stack", 0.1),
    "stack at 20 %": ("stack", 0.2),
    "stack at 40 %": ("stack", 0.4),
    "zero at 20 %": ("zero", 0.2),
    "random at 20 %": ("random", 0.2),
}
"""The operator, and the tokens of the small model over those of a whole one from scratch."""


def growth(options: argparse.Namespace) -> None:
    """Train every way with every seed, each for as many operations as the one from scratch."""
    folder, corpora = options.folder / "growth", options.folder / "corpora"
    all_corpora(corpora, [CORPUS])
    tokens = whole_number(options.tokens, "--tokens", least=100_000)
    jobs = [(way, seed) for seed in range(options.seeds) for way in (SCRATCH, *WAYS)]
    runs = [partial(_train, folder, corpora / CORPUS, way, seed, tokens) for way, seed in jobs]
    curves: dict[str, list[np.ndarray]] = {}
    for (way, _), curve in zip(jobs, in_parallel(runs), strict=True):
        curves.setdefault(way, []).append(curve)
    results: dict[str, Any] = {"tokens": options.tokens, "seeds": options.seeds}
    results |= {"layers": [LAYERS // FACTOR, LAYERS], "ways": _rows(curves)}
    print(*report(results), sep="\n")
    (options.out / "growth.json").write_text(to_json(results), encoding="utf-8")
    plot(curves, options.out / "growth.png")


def _train(folder: Path, corpus: Path, way: str, seed: int, tokens: int) -> np.ndarray:
    """Train one run; [evaluation, (operations, bits per byte)], those of its base included."""
    run = folder / f"{''.join(filter(str.isalnum, way))}-{seed}-{tokens}"
    config: dict[str, Any] = {**yaml.safe_load(CONFIG), "seed": seed}
    config["data"]["sources"] = {CORPUS: {"path": str(corpus)}}
    config["model"]["num_layers"] = LAYERS
    config["eval"]["every_steps"] = tokens // 1536 // 12
    config["optim"]["warmup_tokens"] = tokens // 20
    before = 0.0
    if way != SCRATCH:
        operator, part = WAYS[way]
        config["model"]["num_layers"] = LAYERS // FACTOR
        at_tokens = int(tokens * part)
        config["growth"] = {"operator": operator, "factor": FACTOR, "at_tokens": at_tokens}
        if operator == "random":
            config["growth"]["mask_tokens"] = tokens // 5
        before = at_tokens * flops(LAYERS // FACTOR)
        tokens -= int(before / flops(LAYERS))
    config["train"]["tokens"] = tokens
    train(run, config)
    found = [row for row in rows(run) if "eval" in row]
    scores = [row["eval"][CORPUS]["bits_per_byte"] for row in found]
    spent = [before + row["tokens_seen"] * flops(LAYERS) for row in found]
    return np.stack([spent, scores], axis=1)


def flops(num_layers: int) -> float:
    """Operations of training on one token of a full sequence."""
    words = [f"model.num_layers={num_layers}", f"data.sources.{CORPUS}.path=none"]
    model = finalize(parse_config(CONFIG, words), {CORPUS: 10**9}, 257).model
    return batch_flops(model, [CONTEXT]) / CONTEXT


def _rows(curves: dict[str, list[np.ndarray]]) -> list[dict[str, Any]]:
    table = []
    for way, found in curves.items():
        pairs = list(zip(found, curves[SCRATCH], strict=True))
        row: dict[str, Any] = {"way": way, "bits_per_byte": spread([one[-1, 1] for one in found])}
        row["over_scratch"] = spread([one[-1, 1] - other[-1, 1] for one, other in pairs])
        row["speed_up"] = [speed_up(one, other) for one, other in pairs]
        table.append(row)
    return table


def speed_up(grown: np.ndarray, scratch: np.ndarray) -> float | None:
    """The paper's sp: operations from scratch, over those after which the grown model is as good
    for good, less 1. None: it never is. Its rate has not decayed there, so this is too little."""
    better = grown[:, 1] <= scratch[-1, 1]
    if not better[-1]:
        return None
    last = len(better) - int(np.argmin(better[::-1])) if not better.all() else 0
    if last == 0:
        return float(scratch[-1, 0] / grown[0, 0] - 1)
    (x0, y0), (x1, y1) = grown[last - 1], grown[last]
    reached = x0 + (x1 - x0) * (y0 - scratch[-1, 1]) / (y0 - y1)
    return float(scratch[-1, 0] / reached - 1)


def report(results: dict[str, Any]) -> Iterator[str]:
    """The table, a line each; means over seeds and their range."""
    small, large = results["layers"]
    yield f"{small} layers grown to {large}, worth {results['tokens']} tokens of the large model"
    yield f"{'way':<22}{'bits per byte':<24}{'over scratch':<28}speed-up by seed"
    for row in results["ways"]:
        gain = f"{shown(row['over_scratch']):<28}"
        ups = ", ".join("never" if one is None else f"{one:+.0%}" for one in row["speed_up"])
        yield f"{row['way']:<22}{shown(row['bits_per_byte']):<24}{gain}{ups}"


def plot(curves: dict[str, Sequence[np.ndarray]], path: Path) -> None:
    """Held-out bits per byte over operations, means over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for way, found in curves.items():
        mean = np.mean(found, axis=0)
        style = {"color": "black", "linewidth": 2.5} if way == SCRATCH else {}
        axes.plot(mean[:, 0] / 1e12, mean[:, 1], label=way, **style)
    axes.set(xlabel="floating-point operations, 1e12", ylabel="held-out bits per byte")
    worst = max(found[0][len(found[0]) // 4, 1] for found in curves.values())
    axes.set_ylim(top=worst)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
