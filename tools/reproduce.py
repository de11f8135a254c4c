"""Results of the papers on small models and real text: `python tools/reproduce.py moe [...]`.

moe: "Demons in the Detail" (arXiv 2501.11873). The same model with experts trains on several
domains under each kind of balance, with the same data and seeds: held-out loss, how even the
experts are used, and how far the domains differ in the experts they use.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_hdp import to_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "configs" / "results"
DOMAINS = ("python_stdlib", "c_headers", "man_pages_de", "man_pages_en")
"""Recipes in `data`; those whose files a machine lacks are left out."""
BALANCES = {
    "micro": ("model.moe.balance=micro",),
    "global, exact": ("model.moe.estimate=exact",),
    "global, trend": ("model.moe.estimate=trend",),
    "global, batch before": ("model.moe.estimate=previous",),
    "exact + 1 % micro": ("model.moe.estimate=exact", "model.moe.micro_share=0.01"),
    "loss-free": ("model.moe.balance=loss_free", "model.moe.bias_rate=0.01"),
}
KEYS = ("early_balance_loss", "balance_loss", "max_violation", "divergence_bits")
"""What a run says of its experts: means over the first and the last quarter of its steps (balance
loss), over the last (violation), and of the trained model on held-out text."""
CONFIG = """
model:
  num_layers: 3
  hidden_size: 96
  num_heads: 3
  moe: {num_experts: 8, top_k: 2, balance_weight: 0.02}
data:
  context_tokens: 256
  global_batch_tokens: 8192
  max_epochs: 20
planner: {capacity_tokens: 512}
optim: {lr: 3.0e-3, warmup_tokens: 100K}
train: {precision: fp32, threads: 1}
eval: {every_steps: 0, tokens: 60K}
checkpoint: {save_every_steps: 0}
monitor: {log_every_steps: 20, tensorboard: false}
"""


def main() -> int:
    """Run one reproduction."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=["moe"])
    parser.add_argument("--tokens", default="2M", help="of every run (default: 2M)")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "reproduce", help="of runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="of JSON and pictures")
    options = parser.parse_args()
    moe(options)
    return 0


def moe(options: argparse.Namespace) -> None:
    """Train every balance with every seed, as many at a time as there are cores."""
    folder: Path = options.folder / "moe"
    folder.mkdir(parents=True, exist_ok=True)
    domains = list(corpora(folder / "corpora"))
    if len(domains) < 2:
        raise SystemExit(f"reproduce.py: only {domains} found; data/*.yaml say what to install")
    config = yaml.safe_load(CONFIG)
    config["data"]["sources"] = {n: {"path": str(folder / "corpora" / n)} for n in domains}
    config["data"]["stages"] = [{"blend": dict.fromkeys(domains, 1.0)}]
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    jobs = [(name, seed) for seed in range(options.seeds) for name in BALANCES]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in BALANCES}
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        running = [pool.submit(_train, folder, name, seed, options.tokens) for name, seed in jobs]
        for done, ((name, _), one) in enumerate(zip(jobs, running, strict=True), start=1):
            found[name].append(one.result())
            left_s = (time.monotonic() - began) / done * (len(jobs) - done)
            print(f"{done} of {len(jobs)}, about {left_s / 60:.0f} min left", file=sys.stderr)
    results = {"tokens": options.tokens, "domains": domains, "seeds": options.seeds}
    results |= {"balances": [_row(name, rows) for name, rows in found.items()]}
    print(*report(results), sep="\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "moe.json").write_text(to_json(results), encoding="utf-8")
    shares = {name: np.array(rows[0]["share"]) for name, rows in found.items()}
    plot(domains, shares, options.out / "moe.png")
    print(f"written: {options.out}/moe.json, {options.out}/moe.png")


def corpora(folder: Path) -> Iterator[str]:
    """Prepare the domains that this machine has text of; their names."""
    for name in DOMAINS:
        out = folder / name
        if not (out / "corpus.json").exists():
            command = [sys.executable, "-m", "megascale", "prepare", f"data/{name}.yaml"]
            done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=_environment())
            if done.returncode:
                continue
        yield name


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _train(folder: Path, name: str, seed: int, tokens: str) -> dict[str, Any]:
    """Train one run, unless it is there, and look at its experts; its scores."""
    run = folder / f"{''.join(filter(str.isalnum, name))}-{seed}-{tokens}"
    megascale, more = [sys.executable, "-m", "megascale"], (f"run_dir={run}", f"seed={seed}")
    picture = run / "plots" / "experts_heldout.json"
    if not picture.exists():
        words = [str(folder / "config.yaml"), *more, f"train.tokens={tokens}", *BALANCES[name]]
        for command in (["train", *words, "--resume", "auto"], ["experts", str(run)]):
            done = subprocess.run(
                [*megascale, *command], env=_environment(), capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{name}, seed {seed}: {done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    early, late = steps[: len(steps) // 4], steps[len(steps) * 3 // 4 :]
    experts = json.loads(picture.read_text())
    scores = [row["eval"] for row in rows if "eval" in row][-1]
    return {
        "heldout": {domain: score["bits_per_byte"] for domain, score in scores.items()},
        "max_violation": statistics.fmean(row["max_violation"] for row in late),
        "balance_loss": statistics.fmean(row["balance_loss"] for row in late),
        "early_balance_loss": statistics.fmean(row["balance_loss"] for row in early),
        "divergence_bits": statistics.fmean(experts["divergence_bits"]),
        "share": list(experts["share"].values()),
    }


def _row(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = [statistics.fmean(row["heldout"].values()) for row in rows]
    row: dict[str, Any] = {"balance": name, "bits_per_byte": _spread(means)}
    for key in KEYS:
        row[key] = _spread([one[key] for one in rows])
    row["by_domain"] = {
        domain: _spread([one["heldout"][domain] for one in rows]) for domain in rows[0]["heldout"]
    }
    return row


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds, least and most."""
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}


def report(results: dict[str, Any]) -> Iterator[str]:
    """The table, a line each; means over seeds and their range."""
    yield f"{results['tokens']} tokens, {results['seeds']} seeds, {', '.join(results['domains'])}"
    yield f"{'balance':<24}{'bits per byte':<26}{'max violation':<26}divergence of domains, bits"
    for row in results["balances"]:
        columns = (row[key] for key in ("bits_per_byte", "max_violation", "divergence_bits"))
        shown = (f"{one['mean']:.4f} ({one['least']:.4f}-{one['most']:.4f})" for one in columns)
        yield f"{row['balance']:<24}" + "".join(f"{one:<26}" for one in shown)


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


if __name__ == "__main__":
    sys.exit(main())
