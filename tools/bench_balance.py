"""Balance losses of experts: `python tools/bench.py balance [--quick] [--out DIR]`.

One model with experts trains on 2 CPU ranks over gloo, on pieces of Python source and of English
text, several micro-batches a rank. Now and then every way to know the use that the whole batch
makes of the experts computes its gradient, of the same weights and batch, and that is held against
`exact`: the distance, as part of what the balance loss adds at all. Then all ways train in turn,
and a ratio of step times is the median of the rounds' own ratios to `micro`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_hdp import RESULTS, Batches, to_json
from bench_planner import Progress

from megascale.config import finalize, parse_config
from megascale.corpus.batches import GlobalBatch
from megascale.planner import PLANNERS, Problem

WORLD, BATCH_TOKENS, CAPACITY, VOCAB = 2, 8192, 512, 257
CONFIG = f"""
model:
  num_layers: 4
  hidden_size: 128
  num_heads: 4
  num_kv_heads: 2
  moe: {{num_experts: 8, balance_weight: 0.05}}
data: {{sources: {{code: {{path: none}}, text: {{path: none}}}}, context_tokens: 1024}}
planner: {{capacity_tokens: {CAPACITY}}}
optim: {{lr: 2e-3, distributed_optimizer: false}}
train: {{precision: fp32, tokens: 1M, threads: 1}}
"""
WAYS = {
    "exact": ("model.moe.estimate=exact",),
    "trend": ("model.moe.estimate=trend",),
    "previous": ("model.moe.estimate=previous",),
    "previous_corrected": ("model.moe.estimate=previous_corrected",),
    "buffer": ("model.moe.estimate=buffer",),
    "buffer_corrected": ("model.moe.estimate=buffer_corrected",),
    "micro": ("model.moe.balance=micro",),
    "sequence": ("model.moe.balance=sequence",),
    "none": ("model.moe.balance=none",),
}
DEFAULT = "trend"
"""What trains the model whose gradients are compared."""
GOAL = 1.03
"""Step time of `global` (its default estimate) over that of `micro`, at most."""


class Bytes:
    """A shard of one document in memory."""

    prefix = "in memory"

    def __init__(self, files: Sequence[Path], most: int = 4_000_000) -> None:
        content = b"".join(path.read_bytes() for path in files)[:most]
        self.ids = np.frombuffer(content, np.uint8).astype(np.int64)

    def read(self, document: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens from `start` on."""
        return self.ids[start : None if count is None else start + count]


def texts() -> dict[str, Bytes]:
    """Source files of the standard library, and the prose that came with its packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = Path(sysconfig.get_paths()["purelib"])
    prose = [
        path for kind in ("*.md", "*.rst", "*.txt", "*METADATA") for path in packages.rglob(kind)
    ]
    return {"code": Bytes(sorted(library.glob("*.py"))), "text": Bytes(sorted(prose))}


class Bench:
    """One rank with a model for each way."""

    def __init__(self) -> None:
        from megascale.mesh.reader import MicroBatchReader, TokenSource
        from megascale.model.build import build_model, pack_multiple
        from megascale.optim.build import build_optimizer
        from megascale.run.step_problem import cost_model
        from megascale.runtime import distributed
        from megascale.training.step import Learner

        tokens = {"code": 10**6, "text": 10**6}
        configs = {
            way: finalize(parse_config(CONFIG, overrides), tokens, VOCAB)
            for way, overrides in WAYS.items()
        }
        self.config = configs[DEFAULT]
        self.ranks = distributed.start(self.config)
        self.learners = {}
        for way, config in configs.items():
            model = build_model(config, self.ranks)
            self.learners[way] = Learner(config, self.ranks, model, build_optimizer(config, model))
        self.texts = texts()
        sources = [TokenSource(name, one, 256, VOCAB) for name, one in self.texts.items()]  # type: ignore[arg-type]
        self.reader = MicroBatchReader(
            sources,
            self.ranks.hdp_rank,
            pack_multiple(self.config, self.ranks.device),
            self.ranks.device,
            self.ranks.axis,
        )
        self.cost = cost_model(self.config)

    def show(self, progress: Progress, what: str) -> None:
        """A step of progress."""
        if self.ranks.rank == 0:
            progress.show(what)

    def batch(self, step: int) -> tuple[list[Any], int]:
        """(this rank's micro-batches, tokens of all) of a step."""
        drawn = Batches(180, 1.0, 0).draw(step, BATCH_TOKENS)
        lengths = np.minimum(drawn, WORLD * CAPACITY).astype(np.int32)
        generator = np.random.default_rng(step)
        source = generator.integers(0, 2, len(lengths)).astype(np.int16)
        most = [len(one.ids) - 2048 for one in self.texts.values()]
        start = np.array([generator.integers(most[s]) for s in source], dtype=np.int64)
        batch = GlobalBatch(step, source, np.zeros(len(lengths), np.int64), start, lengths)
        problem = Problem.of(lengths, WORLD, CAPACITY, "free", self.cost)
        plan = PLANNERS["hybrid"](problem)
        return list(self.reader.read(plan, batch)), int(lengths.sum())

    def step(self, way: str, step: int) -> tuple[float, Any]:
        """Train one step; (seconds of the slowest rank, its result)."""
        import torch
        import torch.distributed as dist

        from megascale.training.step import train_step

        micro_batches, tokens = self.batch(step)
        dist.barrier()
        seen = (step + 1) * BATCH_TOKENS
        result = train_step(self.learners[way], micro_batches, len(micro_batches), tokens, seen)
        seconds = torch.tensor(result.seconds)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds), result

    def gradient(self, way: str, step: int, state: dict[str, Any]) -> np.ndarray:
        """Of the summed loss with the weights, and the loads before, of `state`; all ranks'."""
        import torch
        from megatron.core.distributed import finalize_model_grads

        from megascale.training.step import look, run_micro_batches

        learner, (micro_batches, tokens) = self.learners[way], self.batch(step)
        model = learner.model
        model.chunks[0].module.load_state_dict(state, strict=False)
        model.zero_grad_buffer()
        if model.balance.looks_first:
            model.balance.adopt(look(learner, micro_batches, len(micro_batches)))
        model.balance.begin(len(micro_batches), tokens)
        run_micro_batches(learner, micro_batches, len(micro_batches))
        finalize_model_grads(model.chunks)
        grads = [one.main_grad.double().flatten() for one in model.parameters()]
        return torch.cat(grads).numpy()


def distances(bench: Bench, steps: int, every: int, progress: Progress) -> dict[str, list[float]]:
    """Of every way to `exact`, as part of what `exact` adds, while one model trains."""
    found: dict[str, list[float]] = {way: [] for way in WAYS if way not in ("exact", "none")}
    found |= {"balance_loss": [], "max_violation": []}
    for step in range(steps):
        bench.show(progress, "how near to exact")
        if step and step % every == 0:
            model = bench.learners[DEFAULT].model
            tensors = {
                k: v for k, v in model.chunks[0].module.state_dict().items() if v is not None
            }
            state = {name: one.clone() for name, one in tensors.items()}
            grads = {way: bench.gradient(way, step, state) for way in WAYS if way != DEFAULT}
            exact, none = grads["exact"], grads["none"]
            # the trainer itself last: it keeps the loads of the batches before, as a run would
            grads[DEFAULT] = bench.gradient(DEFAULT, step, state)
            for way in WAYS:
                if way in found:
                    apart = np.linalg.norm(grads[way] - exact) / np.linalg.norm(exact - none)
                    found[way].append(float(apart))
        _, result = bench.step(DEFAULT, step)
        found["balance_loss"].append(float(result.experts.loss_L.mean()))
        found["max_violation"].append(float(result.experts.max_violation_L.max()))
    return found


def times(bench: Bench, rounds: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Seconds of a step in every way, in turn, and the ratio to `micro`."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    ways = list(WAYS)
    for turn in range(rounds + 1):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            bench.show(progress, f"time of {way}")
            taken, _ = bench.step(way, turn)
            if turn:
                seconds[way].append(taken)
    micro = np.array(seconds["micro"])
    return {
        way: {
            "step_s": statistics.median(one),
            "over_micro": float(np.median(np.array(one) / micro)),
        }
        for way, one in seconds.items()
    }


def run_rank(quick: bool, answer: Path) -> None:
    """What each rank does; the first writes the results to `answer`."""
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    bench = Bench()
    steps, every, rounds = (8, 4, 1) if quick else (60, 5, 15)
    progress = Progress(steps + (rounds + 1) * len(WAYS))
    results = {
        "distance": distances(bench, steps, every, progress),
        "time": times(bench, rounds, progress),
    }
    if bench.ranks.rank == 0:
        progress.end()
        answer.write_text(json.dumps(results), encoding="utf-8")
    distributed.stop()


def report(results: dict[str, Any]) -> list[str]:
    """The table, a line each."""
    lines = ["way                  gradient from exact: median (most)   step over micro"]
    for way, time in results["time"].items():
        apart = results["distance"].get(way)
        shown = f"{statistics.median(apart):.3f} ({max(apart):.3f})" if apart else "-"
        lines.append(f"{way:<20} {shown:<36} {time['over_micro']:.3f}x")
    reached = results["time"][DEFAULT]["over_micro"]
    word = "reached" if reached <= GOAL else "NOT reached"
    lines.append(f"global ({DEFAULT}) over micro: {reached:.3f}x, goal {GOAL}x {word}")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Distances over training, a line for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for way, values in results["distance"].items():
        if way in WAYS:
            steps = 5 * np.arange(1, len(values) + 1)
            axes.plot(steps, values, "o-", markersize=3, label=way)
    axes.set(yscale="log", xlabel="step", ylabel="distance to exact / what exact adds")
    title = "Gradient of the balance loss: how near to that of the whole batch"
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False)
    figure.savefig(path)


def bench_balance(arguments: Sequence[str]) -> None:
    """Run on 2 ranks, print the table, and write JSON and picture."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(WORLD), __file__, "--answer", str(answer)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        subprocess.run([*command, *["--quick"] * options.quick], check=True, env=environment)
        results = json.loads(answer.read_text(encoding="utf-8"))
    print(*report(results), sep="\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "balance.json").write_text(to_json(results), encoding="utf-8")
        plot(results, options.out / "balance.png")
        print(f"written: {options.out}/balance.json, {options.out}/balance.png")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of `bench.py balance`."""
    parser = argparse.ArgumentParser(prog="bench.py balance", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, nothing kept")
    parser.add_argument("--out", type=Path, help="folder; default: configs/results, if not quick")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out or (None if options.quick else RESULTS)
    return options


def main() -> None:
    """As a rank where an answer is asked for, else as the bench."""
    options = parse(sys.argv[1:])
    if options.answer:
        run_rank(options.quick, options.answer)
    else:
        bench_balance(sys.argv[1:])


if __name__ == "__main__":
    main()
