"""What balances experts, and over how much: see `reproduce.py`."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_hdp import to_json
from small_runs import corpora, in_parallel, rows, scores, shown, spread, train

DOMAINS = ("python_stdlib", "c_headers", "man_pages_de", "man_pages_en")
"""Recipes in `data`; those whose files a machine lacks are left out."""
LOSS = {"balance_weight": 0.02}
BALANCES: dict[str, dict[str, Any]] = {
    "micro": {**LOSS, "balance": "micro"},
    "global": LOSS,
    "global + 1 % micro": {**LOSS, "micro_share": 0.01},
    "loss-free": {"balance": "loss_free", "bias_rate": 0.01},
}
KEYS = ("early_balance_loss", "balance_loss", "max_violation", "divergence_bits")
"""What a run says of its experts: means over the first and the last quarter of its steps (balance
loss), over the last (violation), and of the trained model on held-out text."""
CONFIG = """
model:
  num_layers: 3
  hidden_size: 96
  num_heads: 3
  moe: {num_experts: 8, top_k: 2}
data:
  context_tokens: 512
  global_batch_tokens: 3072
  max_epochs: 20
planner: {capacity_tokens: 512}
optim: {lr: 2.0e-3, warmup_tokens: 150K}
train: {precision: fp32, threads: 1}
eval: {every_steps: 0, tokens: 60K}
checkpoint: {save_every_steps: 0}
monitor: {log_every_steps: 50, tensorboard: false}
"""


def moe(options: argparse.Namespace) -> None:
    """Train every balance with every seed."""
    folder: Path = options.folder / "moe"
    domains = list(corpora(options.folder / "corpora", DOMAINS))
    if len(domains) < 2:
        raise SystemExit(f"reproduce.py: only {domains} found; data/*.yaml say what to install")
    data = {
        "sources": {name: {"path": str(options.folder / "corpora" / name)} for name in domains},
        "stages": [{"blend": dict.fromkeys(domains, 1.0)}],
    }
    jobs = [(name, seed) for seed in range(options.seeds) for name in BALANCES]
    runs = [partial(_train, folder, data, name, seed, options.tokens) for name, seed in jobs]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in BALANCES}
    for (name, _), one in zip(jobs, in_parallel(runs), strict=True):
        found[name].append(one)
    results = {"tokens": options.tokens, "domains": domains, "seeds": options.seeds}
    results |= {"balances": [_row(name, ones) for name, ones in found.items()]}
    print(*report(results), sep="\n")
    (options.out / "moe.json").write_text(to_json(results), encoding="utf-8")
    shares = {name: np.array(ones[0]["share"]) for name, ones in found.items()}
    plot(domains, shares, options.out / "moe.png")


def _train(folder: Path, data: Any, name: str, seed: int, tokens: str) -> dict[str, Any]:
    """Train one run and look at its experts; its scores."""
    run = folder / f"{''.join(filter(str.isalnum, name))}-{seed}-{tokens}"
    config = yaml.safe_load(CONFIG)
    config["data"] |= data
    config["model"]["moe"] |= BALANCES[name]
    config["train"]["tokens"] = tokens
    train(run, {**config, "seed": seed}, ["experts", str(run)])
    steps = [row for row in rows(run) if "loss" in row]
    early, late = steps[: len(steps) // 4], steps[len(steps) * 3 // 4 :]
    experts = json.loads((run / "plots" / "experts_heldout.json").read_text())
    return {
        "heldout": scores(run),
        "max_violation": statistics.fmean(row["max_violation"] for row in late),
        "balance_loss": statistics.fmean(row["balance_loss"] for row in late),
        "early_balance_loss": statistics.fmean(row["balance_loss"] for row in early),
        "divergence_bits": statistics.fmean(experts["divergence_bits"]),
        "share": list(experts["share"].values()),
    }


def _row(name: str, ones: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = [statistics.fmean(one["heldout"].values()) for one in ones]
    row: dict[str, Any] = {"balance": name, "bits_per_byte": spread(means)}
    for key in KEYS:
        row[key] = spread([one[key] for one in ones])
    row["by_domain"] = {
        domain: spread([one["heldout"][domain] for one in ones]) for domain in ones[0]["heldout"]
    }
    return row


def report(results: dict[str, Any]) -> Iterator[str]:
    """The table, a line each; means over seeds and their range."""
    yield f"{results['tokens']} tokens, {results['seeds']} seeds, {', '.join(results['domains'])}"
    yield f"{'balance':<24}{'bits per byte':<26}{'max violation':<26}divergence of domains, bits"
    for row in results["balances"]:
        columns = (row[key] for key in ("bits_per_byte", "max_violation", "divergence_bits"))
        yield f"{row['balance']:<24}" + "".join(f"{shown(one, 4):<26}" for one in columns)


def plot(domains: Sequence[str], shares: dict[str, np.ndarray], path: Path) -> None:
    """For each balance, of the first seed, what every domain uses over what all do: heat maps of
    layers over experts, these in the order of the domain that uses them most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(domains) + 2, 1.5 * len(shares)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shares), len(domains), squeeze=False)
    for panels, (name, shares_SLE) in zip(grid, shares.items(), strict=True):
        pooled = shares_SLE.mean(axis=0)
        order = np.argsort(shares_SLE.argmax(axis=0), axis=1, kind="stable")
        for axes, domain, share in zip(panels, domains, shares_SLE, strict=True):
            over = np.divide(share, pooled, out=np.zeros_like(share), where=pooled > 0)
            values = np.take_along_axis(over, order, 1)
            image = axes.imshow(values, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
            axes.set(xticks=[], yticks=range(len(values)), yticklabels=range(1, len(values) + 1))
            if axes.get_subplotspec().is_first_row():
                axes.set_title(domain, fontsize=9)
        panels[0].set_ylabel(f"{name}\nlayer", fontsize=8)
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.7, extend="max")
    bar.set_label("use of an expert over that of all domains", fontsize=8)
    figure.savefig(path, dpi=120)
