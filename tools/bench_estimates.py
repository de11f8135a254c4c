"""How near estimates of the batch's use of experts come: `python tools/bench.py estimates`.

The balance loss wants the use that the whole global batch makes of the experts; how it is known,
`model.moe.estimate` says. How near that comes depends on the ranks a batch is divided over, their
micro-batches, its tokens, and how far training has come. A small model with experts trains on
pieces of several domains; at some steps its routers look at a larger batch in each of some steps in
a row. Given what they chose, the gradient of the balance loss at the router weights is linear in
the load, so the batch can be cut over any number of ranks on paper: every estimate gets the counts
that a rank would have, through the code that training runs.

Distances are parts of the exact gradient: in one step, and of the mean over the steps in a row,
which is about what an optimizer with beta1 = 0.9 follows. `bench.py balance` measures the first
with all parameters and real ranks.

An estimate that looks back changes what it will see. So the model also trains under each of these
from the start, and how even its experts are used is held against `exact`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from bench_hdp import RESULTS, to_json
from bench_planner import Progress
from numpy.typing import NDArray
from reproduce_moe import DOMAINS
from small_runs import ROOT, corpora

Floats = NDArray[np.float64]

EXPERTS, TOP_K, HIDDEN = 16, 2, 96
BLOCK_TOKENS, CAPACITY = 512, 2048
AT_STEPS, IN_A_ROW = (20, 80, 240), 10
BATCH_TOKENS = (8192, 32768, 131072)
RANKS, MICRO_BATCHES = (1, 2, 8, 32), (1, 2, 4, 8)
MOST_PARTS = 4
"""Batches of fewer tokens are this many parts of the largest one, at most."""
TRAIN_STEPS, SEEDS = 40, 2
LOOK_BACK = ("exact", "previous", "trend")
WAYS = ("micro", "buffer", "buffer_corrected", "previous", "previous_corrected", "trend")
CONFIG = f"""
model:
  num_layers: 3
  hidden_size: {HIDDEN}
  num_heads: 3
  moe: {{num_experts: {EXPERTS}, top_k: {TOP_K}, balance_weight: 0.02}}
data: {{context_tokens: {BLOCK_TOKENS}, global_batch_tokens: 8192, max_epochs: 50}}
planner: {{capacity_tokens: {CAPACITY}}}
optim: {{lr: 3.0e-3, warmup_tokens: 100K, distributed_optimizer: false}}
train: {{precision: fp32, threads: 1, tokens: 10M}}
"""


@dataclass(frozen=True)
class Routing:
    """What one router did with the blocks of a batch; B blocks, E experts, H hidden."""

    counts_BE: Floats
    """Choices."""
    slopes_BEEH: NDArray[np.float32]
    """For a load of expert f of 1 alone, the gradient of a block's balance loss at the router's
    weights: [block, f, expert, hidden] = sum over tokens of p_e ((e = f) - p_f) x_h."""


class Trial:
    """A model in training on one process, and batches to look at."""

    def __init__(self, folder: Path, estimate: str = "exact", seed: int = 0) -> None:
        from megascale.config import finalize, parse_config
        from megascale.corpus.batches import Cursor, GlobalBatches
        from megascale.corpus.shards import Shard
        from megascale.corpus.sources import describe
        from megascale.mesh.reader import MicroBatchReader, TokenSource
        from megascale.model.balance import BalancedRouter
        from megascale.model.build import build_model, pack_multiple
        from megascale.optim.build import build_optimizer
        from megascale.run.step_problem import cost_model
        from megascale.runtime import distributed
        from megascale.training.step import Learner

        self.domains = list(corpora(folder, DOMAINS))
        raw = yaml.safe_load(CONFIG)
        raw["data"]["sources"] = {name: {"path": str(folder / name)} for name in self.domains}
        raw["data"]["stages"] = [{"blend": dict.fromkeys(self.domains, 1.0)}]
        raw["model"]["moe"]["estimate"], raw["seed"] = estimate, seed
        infos = {name: describe(folder / name, None, None, None) for name in self.domains}
        tokens = {name: info.train_tokens for name, info in infos.items()}
        vocab_size = max(info.vocab_size for info in infos.values())
        config = finalize(parse_config(yaml.safe_dump(raw)), tokens, vocab_size)
        ranks = distributed.start(config)
        model = build_model(config, ranks)
        self.learner = Learner(config, ranks, model, build_optimizer(config, model))
        self.routers = [one for one in model.modules() if isinstance(one, BalancedRouter)]
        shards = {name: Shard.open(info.train) for name, info in infos.items()}
        large = replace(config.data, global_batch_tokens=max(BATCH_TOKENS))
        self.batches = GlobalBatches(config.data, shards, seed)
        self.large_batches = GlobalBatches(large, shards, seed + 1)
        self.cursor, self.large_cursor = Cursor(), Cursor()
        sources = [
            TokenSource(name, shards[name], infos[name].first_id, vocab_size)
            for name in self.batches.names
        ]
        self.reader = MicroBatchReader(
            sources, 0, pack_multiple(config, ranks.device), ranks.device, ranks.axis
        )
        self.cost = cost_model(config)

    def step(self) -> float:
        """Train one step; the balance loss of its batch, mean over layers."""
        from megascale.training.step import train_step

        batch, self.cursor = self.batches.next(self.cursor)
        micro_batches = list(self.reader.read(self._plan(batch), batch))
        seen, count = self.cursor.tokens_seen, len(micro_batches)
        result = train_step(self.learner, micro_batches, count, batch.num_tokens, seen)
        assert result.experts is not None
        return float(result.experts.loss_L.mean())

    def look(self) -> list[Routing]:
        """What the routers do with the next large batch, its sequences in random order."""
        import torch

        from megascale.training.step import evaluate

        batch, self.large_cursor = self.large_batches.next(self.large_cursor)
        plan = self._plan(batch)
        micro_batches = list(self.reader.read(plan, batch))
        inputs: list[list[torch.Tensor]] = [[] for _ in self.routers]
        hooks = [
            router.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
            for router, kept in zip(self.routers, inputs, strict=True)
        ]
        evaluate(self.learner, micro_batches, len(micro_batches))
        for hook in hooks:
            hook.remove()
        order = [i for ring in plan.rings_of(0) for i in ring.sequences]
        block_T = np.repeat(_blocks(batch.length, batch.step)[order], batch.length[order])
        rows = [one.num_tokens for one in micro_batches]
        return [
            _routing(
                router, [x.flatten(0, -2)[:n] for x, n in zip(kept, rows, strict=True)], block_T
            )
            for router, kept in zip(self.routers, inputs, strict=True)
        ]

    def _plan(self, batch: Any) -> Any:
        from megascale.planner import PLANNERS, Problem

        problem = Problem.of(batch.length, 1, CAPACITY, "free", self.cost)
        return PLANNERS["longest_first"](problem)


def _blocks(lengths: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """A block of about BLOCK_TOKENS for each sequence, none without; in random order."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    begins = np.cumsum(lengths[order]) - lengths[order]
    blocks = np.empty(len(lengths), np.int64)
    blocks[order] = np.minimum(begins // BLOCK_TOKENS, max(BATCH_TOKENS) // BLOCK_TOKENS - 1)
    return blocks


def _routing(router: Any, inputs: list[Any], block_T: NDArray[np.int64]) -> Routing:
    import torch

    with torch.no_grad():
        x_TH = torch.cat(inputs)
        p_TE = torch.softmax(x_TH @ router.weight.T, dim=-1)
        chosen_TE = torch.zeros_like(p_TE).scatter(1, p_TE.topk(TOP_K).indices, 1.0)
        order = torch.from_numpy(np.argsort(block_T, kind="stable"))
        sizes = np.bincount(block_T, minlength=max(BATCH_TOKENS) // BLOCK_TOKENS).tolist()
        counts, slopes = [], []
        for p, x, chosen in zip(
            *(one[order].split(sizes) for one in (p_TE, x_TH, chosen_TE)), strict=True
        ):
            slope = torch.diag_embed((p.T @ x).T).permute(1, 2, 0)
            slopes.append(slope - torch.einsum("tf,te,th->feh", p, p, x))
            counts.append(chosen.sum(dim=0).double())
        return Routing(torch.stack(counts).numpy(), torch.stack(slopes).numpy())


def estimated_loads(way: str, counts_RME: Floats, befores: Mapping[str, Floats]) -> Floats:
    """The load that each rank's every micro-batch takes, [rank * micro-batch, expert].

    `befores` are the loads that follow from the batches before, by estimate.
    """
    import torch

    from megascale.config import MoeConfig
    from megascale.model.balance import Tally, load_of

    ranks, micro_batches, experts = counts_RME.shape
    flat = torch.from_numpy(counts_RME.reshape(-1, experts))
    if way == "micro":
        return load_of(flat).numpy()
    if way in befores:
        return np.broadcast_to(befores[way], flat.shape)
    before = torch.from_numpy(befores["previous"])
    moe = MoeConfig(num_experts=experts, top_k=TOP_K, estimate=way)
    tally = Tally(moe, 1, torch.device("cpu"))
    part: Any = SimpleNamespace(source_T=torch.zeros(1, dtype=torch.long), over_tensor=lambda x: x)
    loads = []
    for number, counts in enumerate(flat):
        if number % micro_batches == 0:
            tally.begin(micro_batches, int(counts_RME.sum()) // TOP_K)
        part.pack_tokens = int(counts.sum()) // TOP_K
        tally.add(counts[None], torch.zeros(1, experts), part)
        loads.append(tally.estimate(before, part))
    return torch.stack(loads).numpy()


def regimes() -> Iterator[tuple[int, int, int]]:
    """(tokens of the batch, ranks, micro-batches of each) with a block for each micro-batch."""
    for tokens in BATCH_TOKENS:
        for ranks in RANKS:
            for micro_batches in MICRO_BATCHES:
                if ranks * micro_batches * BLOCK_TOKENS <= tokens:
                    yield tokens, ranks, micro_batches


def distances(
    seen: Sequence[Routing], tokens: int, ranks: int, micro_batches: int
) -> dict[str, tuple[float, float]]:
    """By way: (in one step, of the mean over the steps), medians over parts, of one router."""
    blocks = tokens // BLOCK_TOKENS
    parts = min(MOST_PARTS, len(seen[0].counts_BE) // blocks)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for begin in range(0, parts * blocks, blocks):
        part = [
            Routing(one.counts_BE[begin : begin + blocks], one.slopes_BEEH[begin : begin + blocks])
            for one in seen
        ]
        for way, apart in _of_part(part, ranks, micro_batches).items():
            found[way].append(apart)
    return {way: tuple(np.median(rows, axis=0).tolist()) for way, rows in found.items()}


def _of_part(
    seen: Sequence[Routing], ranks: int, micro_batches: int
) -> dict[str, tuple[float, float]]:
    exact, errors = [], {way: [] for way in WAYS}
    loads = [_load(one.counts_BE.sum(axis=0)) for one in seen]
    for step in range(2, len(seen)):
        counts, slopes = seen[step].counts_BE, seen[step].slopes_BEEH
        counts_RME = counts.reshape(ranks, micro_batches, -1, EXPERTS).sum(axis=2)
        slopes = slopes.reshape(ranks * micro_batches, -1, *slopes.shape[1:]).sum(axis=1)
        befores = {"previous": loads[step - 1], "trend": 2 * loads[step - 1] - loads[step - 2]}
        exact.append(np.einsum("f,bfeh->eh", loads[step], slopes))
        for way in WAYS:
            load_BE = estimated_loads(way, counts_RME, befores)
            off = (load_BE - loads[step]).astype(np.float32)
            errors[way].append(np.tensordot(off, slopes, axes=2))
    lengths = np.linalg.norm(exact, axis=(1, 2))
    whole = np.linalg.norm(np.mean(exact, axis=0))
    return {
        way: (
            float(np.median(np.linalg.norm(off, axis=(1, 2)) / lengths)),
            float(np.linalg.norm(np.mean(off, axis=0)) / whole),
        )
        for way, off in errors.items()
    }


def _load(counts_E: Floats) -> Floats:
    load: Floats = counts_E / counts_E.mean()
    return load


def sweep(trial: Trial, at_steps: Sequence[int], in_a_row: int) -> Iterator[dict[str, Any]]:
    """A row for each step and regime, medians over the layers."""
    progress = Progress(max(at_steps) + len(at_steps) * in_a_row)
    for at_step in at_steps:
        while trial.cursor.step < at_step:
            progress.show("training")
            trial.step()
        seen: list[list[Routing]] = [[] for _ in trial.routers]
        for _ in range(in_a_row + 2):  # two to begin with, whose loads are known before
            progress.show("looking")
            for kept, one in zip(seen, trial.look(), strict=True):
                kept.append(one)
            trial.step()
        for tokens, ranks, micro_batches in regimes():
            layers = [distances(one, tokens, ranks, micro_batches) for one in seen]
            yield {
                "step": at_step,
                "batch_tokens": tokens,
                "ranks": ranks,
                "micro_batches": micro_batches,
                "one_step": {way: _middle(layers, way, 0) for way in WAYS},
                "mean_of_steps": {way: _middle(layers, way, 1) for way in WAYS},
            }
    progress.end()


def training(folder: Path, steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each estimate that looks back, and seed: balance loss in halves of the steps."""
    from megascale.runtime import distributed

    progress = Progress(steps * seeds * len(LOOK_BACK))
    for seed in range(seeds):
        for estimate in LOOK_BACK:
            trial, losses = Trial(folder, estimate, seed), []
            for _ in range(steps):
                progress.show(f"training under {estimate}")
                losses.append(trial.step())
            distributed.stop()
            halves = losses[: steps // 2], losses[steps // 2 :]
            first, second = (round(statistics.fmean(half), 4) for half in halves)
            yield {"estimate": estimate, "seed": seed, "first_half": first, "second_half": second}
    progress.end()


def _middle(layers: Sequence[Mapping[str, tuple[float, float]]], way: str, which: int) -> float:
    return round(statistics.median(layer[way][which] for layer in layers), 4)


def report(results: Mapping[str, Any]) -> Iterator[str]:
    """The tables, a line each."""
    if "regimes" in results:
        yield "distance to the exact gradient in one step (of the mean of the steps in a row)"
        ways = " ".join(f"{way:>18}" for way in WAYS)
        yield f"{'step':>5} {'batch':>7} {'ranks':>5} {'each':>4}  {ways}"
    for row in results.get("regimes", ()):
        shown = (f"{row['one_step'][way]:.3f} ({row['mean_of_steps'][way]:.3f})" for way in WAYS)
        place = f"{row['step']:>5} {row['batch_tokens']:>7} {row['ranks']:>5}"
        yield f"{place} {row['micro_batches']:>4}  " + " ".join(f"{one:>18}" for one in shown)
    if "training" in results:
        yield "balance loss when trained under it, in the first and the second half of the steps"
    for row in results.get("training", ()):
        halves = f"{row['first_half']:.4f}  {row['second_half']:.4f}"
        yield f"{row['estimate']:<10} seed {row['seed']}  {halves}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Distances of the largest batch over the tokens of a rank, a line for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = sorted({row["step"] for row in rows})
    figure = Figure(figsize=(3.4 * len(steps) + 1.6, 6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(steps), squeeze=False, sharex=True, sharey=True)
    kinds = {"one_step": "one step", "mean_of_steps": f"mean of {IN_A_ROW} steps"}
    for panels, (kind, words) in zip(grid, kinds.items(), strict=True):
        for axes, step in zip(panels, steps, strict=True):
            for way in WAYS:
                x, y = _line(rows, step, kind, way)
                axes.plot(x, y, "o-", markersize=3, label=way)
            axes.set(xscale="log", yscale="log", title=f"step {step}, {words}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e6e6e6")
        panels[0].set_ylabel("distance to exact")
    for axes in grid[1]:
        axes.set_xlabel("tokens of a micro-batch")
    grid[0, -1].legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    title = f"Balance gradient of {max(BATCH_TOKENS):,} tokens, 4 micro-batches a rank"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path)


def _line(
    rows: Sequence[dict[str, Any]], step: int, kind: str, way: str
) -> tuple[list[int], list[float]]:
    """Tokens of a micro-batch and distances, of the largest batch and 4 micro-batches a rank."""
    of = (step, max(BATCH_TOKENS), 4)
    chosen = [r for r in rows if (r["step"], r["batch_tokens"], r["micro_batches"]) == of]
    return [r["batch_tokens"] // r["ranks"] // 4 for r in chosen], [r[kind][way] for r in chosen]


def bench_estimates(arguments: Sequence[str]) -> None:
    """Train, look, cut on paper; print the tables, and write JSON and picture."""
    from megascale.runtime import distributed

    options = parse(arguments)
    distributed.prepare_device("cpu")  # before megatron-core is imported
    options.corpora.mkdir(parents=True, exist_ok=True)
    at_steps, in_a_row = ((3,), 2) if options.quick else (AT_STEPS, IN_A_ROW)
    steps, seeds = (4, 1) if options.quick else (TRAIN_STEPS, SEEDS)
    path = (options.out or Path()) / "balance_estimates.json"
    results = json.loads(path.read_text("utf-8")) if options.out and path.exists() else {}
    if options.part in ("regimes", None):
        trial = Trial(options.corpora)
        results |= {"domains": trial.domains, "steps_in_a_row": IN_A_ROW}
        results["regimes"] = list(sweep(trial, at_steps, in_a_row))
        distributed.stop()
    if options.part in ("training", None):
        results["training"] = list(training(options.corpora, steps, seeds))
    print(*report(results), sep="\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(results), encoding="utf-8")
        if "regimes" in results:
            plot(results["regimes"], path.with_suffix(".png"))
        print(f"written: {path} and .png")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of `bench.py estimates`."""
    parser = argparse.ArgumentParser(
        prog="bench.py estimates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few steps, nothing kept")
    parser.add_argument("--out", type=Path, help="folder; default: configs/results, if not quick")
    default = ROOT / "runs" / "reproduce" / "corpora"
    parser.add_argument("--corpora", type=Path, default=default, help="made where they are not")
    add = parser.add_argument
    add("--part", choices=["regimes", "training"], help="renew this part of the results only")
    options = parser.parse_args(arguments)
    options.out = options.out or (None if options.quick else RESULTS)
    return options


if __name__ == "__main__":
    bench_estimates(sys.argv[1:])
