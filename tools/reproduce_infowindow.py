"""What small models learn from compressed text: `python tools/reproduce.py infowindow --seeds 1`.

"Training LLMs over Neurally Compressed Text" (arXiv 2404.03626), section 4, small: M2 of one size
trains on the same documents as bytes, BPE, plain AC and Equal-Info Windows, and its bits per byte
of held-out text are compared at equal bytes and at equal tokens. The learning rate is constant
after its warm-up, so that a run's earlier evaluations stand for shorter runs. Everything that was
done already is taken up again; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_hdp import to_json
from small_runs import environment, in_parallel, rows, train

from megascale.config.load import whole_number

M1_TOKENS = "5M"
NOT_AT_THE_TOP = "*/python3*/*/*"


def recipe(name: str, *exclude: str) -> dict[str, Any]:
    """Modules of Python's standard library; the same are held out whatever is excluded."""
    inputs = [{"kind": "python_stdlib", "exclude": [NOT_AT_THE_TOP, *exclude]}]
    return {"name": name, "inputs": inputs, "heldout_fraction": 0.02}


RECIPES = {"m1": recipe("stdlib_top"), "m2": recipe("stdlib_n_to_s", "*/python3*/[!n-s]*")}
"""M1 learns from 5 MB, M2 from 1.5 MB of them, so that M1 can code them all under every code."""
CONFIG = """
model: {num_layers: 3, hidden_size: 96, num_heads: 3}
data: {context_tokens: 256, global_batch_tokens: 2048}
planner: {capacity_tokens: 2048}
optim: {lr: 2.0e-3, curve: constant, warmup_tokens: 50K}
train: {precision: fp32, threads: 1}
eval: {tokens: 100M}
checkpoint: {save_every_steps: 200}
monitor: {log_every_steps: 50, tensorboard: false}
"""
EVALUATIONS = 10


@dataclass(frozen=True)
class Method:
    """A way to turn text into tokens."""

    name: str
    code: str | None = None
    """Of a codebook: ac, tunstall or plain."""
    bits: int = 0
    vocabulary: int = 256
    bpe: int | None = None
    """Ids of a BPE trained on the corpus."""


METHODS = (
    Method("bytes"),
    Method("BPE 8192", bpe=8192),
    Method("plain AC, v256", "plain"),
    Method("b16, v256", "ac", 16),
    Method("b16, v65k", "ac", 16, 65536),
    Method("b32, v256", "ac", 32),
    Method("tunstall, v256", "tunstall", 16),
)


def infowindow(options: argparse.Namespace) -> None:
    """Prepare what is missing, train every method, and write table, JSON and picture."""
    folder, num_bytes = options.folder / "infowindow", whole_number(options.tokens, "--tokens")
    folder.mkdir(parents=True, exist_ok=True)
    m1 = _m1(folder)
    for method in METHODS:  # one by one: coding by M1 takes all cores
        _corpus(folder, m1, method)
    jobs = [
        partial(_run, folder, m1, method, seed, num_bytes)
        for seed in range(options.seeds)
        for method in METHODS
    ]
    found = in_parallel(jobs)
    results = {"bytes": num_bytes, "seeds": options.seeds, "methods": compare(found)}
    print(*report(results), sep="\n")
    (options.out / "infowindow.json").write_text(to_json(results), encoding="utf-8")
    plot(found, options.out / "infowindow.png")


def _m1(folder: Path) -> Path:
    """A small M1, trained on bytes where it is not there."""
    corpus, out = folder / "corpora" / "m1", folder / f"m1-{M1_TOKENS}"
    if not (corpus / "corpus.json").exists():
        _megascale("prepare", str(_recipe(folder, "m1")), "--out", str(corpus))
    if not (out / "m1.safetensors").exists():
        words = ("--shape", "small", f"train.tokens={M1_TOKENS}", "optim.lr=6e-3")
        _megascale("infowindow", "train-m1", str(corpus), "--out", str(out), *words)
    return out / "m1.safetensors"


def _recipe(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(RECIPES[name]), encoding="utf-8")
    return path


def _megascale(*words: str) -> None:
    """Run a verb in a process of its own, which shows how far it is; exits where it fails."""
    done = subprocess.run([sys.executable, "-m", "megascale", *words], env=environment())
    if done.returncode:
        raise SystemExit(f"reproduce.py: megascale {words[0]} failed")


def _corpus(folder: Path, m1: Path, method: Method) -> Path:
    """The corpus of a method, made where it is not there."""
    corpus = folder / "corpora" / _plain(method.name)
    if (corpus / "corpus.json").exists():
        return corpus
    tokenizer: dict[str, Any] = {"kind": "bytes"}
    if method.bpe is not None:
        tokenizer = {"kind": "bpe", "vocab_size": method.bpe}
    if method.code is not None:
        book = folder / f"{m1.parent.name}-{method.code}-{method.bits}.safetensors"
        if not book.exists():
            bits = ("--bits", str(method.bits)) if method.bits else ()
            words = ("--code", method.code, *bits, "--out", str(book))
            _megascale("infowindow", "compile", str(m1), *words)
        tokenizer = {"kind": "infowindow", "path": str(book), "vocab_size": method.vocabulary}
    words = (str(_recipe(folder, "m2")), "--out", str(corpus), "--processes", "1")
    _megascale("prepare", *words, f"tokenizer={json.dumps(tokenizer)}")
    return corpus


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _run(folder: Path, m1: Path, method: Method, seed: int, num_bytes: int) -> dict[str, Any]:
    """Train one M2, or what is left of it; its curve."""
    from megascale.config import load_config
    from megascale.model.counts import flops_per_token

    corpus = _corpus(folder, m1, method)
    facts = json.loads((corpus / "corpus.json").read_text())
    per_token = facts["train"]["bytes"] / facts["train"]["tokens"]
    run = folder / f"{_plain(method.name)}-{seed}-{num_bytes}"
    config = yaml.safe_load(CONFIG) | {"seed": seed}
    config["data"]["sources"] = {"text": {"path": str(corpus)}}
    config["train"]["tokens"] = int(num_bytes / per_token)
    steps = config["train"]["tokens"] // config["data"]["global_batch_tokens"]
    config["eval"]["every_steps"] = max(1, steps // EVALUATIONS)
    train(run, config)
    evaluations = {row["tokens_seen"]: row["eval"]["text"] for row in rows(run) if "eval" in row}
    resolved = load_config(run / "config.yaml")
    guess = float(np.log2(facts["tokenizer"]["vocab_size"] - 1))
    return {
        "method": method.name,
        "bytes_per_token": per_token,
        "uniform": guess * facts["heldout"]["tokens"] / facts["heldout"]["bytes"],
        "unigram": facts["unigram_bits_per_byte"],
        "flops_per_byte": 3 * flops_per_token(resolved.model) / per_token,
        "tokens": list(evaluations),
        "bits_per_byte": [one["bits_per_byte"] for one in evaluations.values()],
    }


def compare(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds at the end (equal bytes) and where the shortest run ends (equal tokens)."""
    fewest = min(row["tokens"][-1] for row in curves)
    compared = []
    for name in dict.fromkeys(row["method"] for row in curves):
        mine = [row for row in curves if row["method"] == name]
        at = [float(np.interp(fewest, row["tokens"], row["bits_per_byte"])) for row in mine]
        last = [row["bits_per_byte"][-1] for row in mine]
        kept = ("method", "bytes_per_token", "uniform", "unigram", "flops_per_byte")
        compared.append(
            {key: mine[0][key] for key in kept}
            | {"at_equal_bytes": float(np.mean(last)), "spread": max(last) - min(last)}
            | {"at_equal_tokens": float(np.mean(at)), "equal_tokens": fewest}
        )
    return compared


def report(results: dict[str, Any]) -> Iterator[str]:
    """The table, a line each."""
    yield f"bits per byte after {results['bytes']:,} bytes, {results['seeds']} seeds"
    yield (
        f"{'method':<16} {'equal bytes':>11} {'equal tokens':>12} {'unigram':>8} {'uniform':>8} "
        f"{'bytes/token':>11} {'MFLOP/byte':>10}"
    )
    for row in results["methods"]:
        yield (
            f"{row['method']:<16} {row['at_equal_bytes']:>11.3f} {row['at_equal_tokens']:>12.3f} "
            f"{row['unigram']:>8.3f} {row['uniform']:>8.3f} {row['bytes_per_token']:>11.2f} "
            f"{row['flops_per_byte'] / 1e6:>10.2f}"
        )


def plot(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte over bytes and over tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["method"] for row in curves))
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("bytes", "tokens"), strict=True):
        for row in curves:
            scale = row["bytes_per_token"] if unit == "bytes" else 1.0
            colour = f"C{names.index(row['method'])}"
            x = np.array(row["tokens"]) * scale
            axes.plot(x, row["bits_per_byte"], color=colour, marker=".", label=row["method"])
        axes.set(xlabel=f"{unit} read", ylabel="bits per byte, held out", ylim=(1, 9))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
