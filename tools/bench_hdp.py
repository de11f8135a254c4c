"""Hybrid data parallelism end to end: `python tools/bench.py hdp [--quick] [--out DIR]`.

The same training step (read, pack, forward, backward, reduce, update) on CPU ranks over gloo,
one thread each, under plans of `hybrid` and of static context parallelism. Every planner trains
its own copy of one model on the same batches, in turn, so that their losses can be compared; a
ratio is the median of the rounds' own ratios. Plans are made before the clock starts: in a run
the planner process makes them ahead. Both plan with a cost model fitted on the spot.

Then, on 2 ranks: the time that the cost model predicts for 20 mixed batches against the measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_planner import Progress

from megascale.config import finalize, parse_config
from megascale.corpus.batches import GlobalBatch
from megascale.monitor.comparison import TimedStep
from megascale.monitor.ratios import Ratio
from megascale.planner import PLANNERS, CostModel, Placed, Problem, StepPlan, complete, step_s
from megascale.planner.fit import Measurement, fit_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

RESULTS = Path(__file__).parents[1] / "configs" / "results"
COMPARED = ("static", "static_best", "hybrid")
OTHER = "calibration"
"""Whose model is trained outside the comparison, so that losses stay comparable."""
COLOURS = {"static": "#b0b0b0", "static_best": "#4393c3", "hybrid": "#d6604d"}
CONTEXT, BATCH_TOKENS, VOCAB = 4096, 16384, 512
CAPACITY = {2: 2048, 4: 1024}
"""Of a rank, by ranks: a sequence of the context needs them all, and static planning gives
every sequence as many."""
CONFIG = """
model: {num_layers: 4, hidden_size: 128, num_heads: 4, num_kv_heads: 2}
data: {sources: {random: {path: none}}, context_tokens: 4096}
train: {precision: fp32, tokens: 100M, threads: 1}
"""
GOALS = {"uniform": 0.98}
LONG_TAILED_GOAL, TRUTH_GOAL, LOSS_GOAL = 1.5, 0.10, 1e-4
TRUTH_RANKS = 2
KERNELS = {
    "attention kernels": ("flash_attention",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "ring: waiting and calls": ("_RingAttention", "c10d::", "gloo:"),
}
"""What a profiler's event counts as, by parts of its name; the rest is the rest."""


@dataclass(frozen=True)
class Batches:
    """A kind of batch: documents of lognormal lengths, one of the context's length among them."""

    median: int
    sigma: float
    num_giants: int = 1

    def draw(self, seed: int, num_tokens: int = BATCH_TOKENS) -> list[int]:
        """Lengths that sum to `num_tokens`, in random order; a sigma of 0 makes all equal."""
        generator = np.random.default_rng(seed)
        lengths = [CONTEXT] * self.num_giants
        while (left := num_tokens - sum(lengths)) > 0:
            drawn = round(self.median * float(np.exp(self.sigma * generator.standard_normal())))
            lengths.append(min(max(drawn, 1), CONTEXT, left))
        return [int(length) for length in generator.permutation(lengths)]

    def describe(self) -> str:
        """For people."""
        if not self.sigma:
            return f"all of {self.median} tokens"
        giants = f"{self.num_giants} of {CONTEXT}, others" if self.num_giants else "all"
        return f"{giants} lognormal, median {self.median}, sigma {self.sigma}, cut at {CONTEXT}"


BATCHES = {
    "short": Batches(32, 1.2),
    "tail": Batches(128, 1.5),
    "uniform": Batches(512, 0.0, num_giants=0),
}
MIXED = (Batches(48, 1.5), Batches(128, 1.5), Batches(512, 1.0, 0), Batches(512, 0.0, 0))
"""Of which the simulator is asked in turn."""


class RandomText:
    """A shard of one document, in memory; any piece of it can be read."""

    prefix = "in memory"

    def __init__(self) -> None:
        self._ids = np.random.default_rng(0).integers(0, VOCAB - 1, BATCH_TOKENS + 1)

    def read(self, document: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens from `start` on."""
        return self._ids[start : None if count is None else start + count]


def batch_of(lengths: Sequence[int]) -> GlobalBatch:
    """Consecutive pieces of the one document, of `lengths` tokens."""
    tokens, zeros = np.array(lengths, dtype=np.int32), np.zeros(len(lengths), dtype=np.int64)
    return GlobalBatch(0, zeros.astype(np.int16), zeros, np.cumsum(tokens) - tokens, tokens)


class Bench:
    """One rank of a world with a model for each planner that is compared."""

    def __init__(self, world: int) -> None:
        from megascale.mesh.reader import TokenSource
        from megascale.run.step_problem import cost_model
        from megascale.runtime import distributed
        from megascale.training.compare import Trainers

        self.capacity = CAPACITY[world]
        overrides = [f"planner.capacity_tokens={self.capacity}"]
        config = finalize(parse_config(CONFIG, overrides), {"random": BATCH_TOKENS}, VOCAB)
        self.ranks = distributed.start(config)
        source = TokenSource("random", RandomText(), VOCAB - 1, VOCAB)  # type: ignore[arg-type]
        self.trainers = Trainers(config, self.ranks, [source], (*COMPARED, OTHER))
        self.cost = cost_model(config)

    def problem(self, lengths: ArrayLike) -> Problem:
        """A step of `lengths` as the planners see it."""
        return Problem.of(lengths, self.ranks.world, self.capacity, "free", self.cost)

    def step_s(self, plan: StepPlan, lengths: Sequence[int]) -> float:
        """Seconds of a step of the model that is outside the comparison."""
        return self.trainers.step(OTHER, plan, batch_of(lengths)).seconds

    def micro_batch(self, size: int, lengths: Sequence[int]) -> float:
        """Seconds of one micro-batch, forward and backward, on each ring of `size` consecutive
        ranks at once; of the slowest rank."""
        import torch
        import torch.distributed as dist

        from megascale.training.step import run_micro_batches

        world = self.ranks.world
        rings = [range(first, first + size) for first in range(0, world, size)]
        places = [list(range(len(lengths) * n, len(lengths) * (n + 1))) for n in range(len(rings))]
        placed = [Placed(ranks, own) for ranks, own in zip(rings, places, strict=True)]
        repeated = list(lengths) * len(rings)
        plan = complete(self.problem(repeated), placed, time.perf_counter())
        (batch,) = self.trainers.reader.read(plan, batch_of(repeated))
        learner = self.trainers.learners[OTHER]
        learner.model.zero_grad_buffer()
        dist.barrier()
        began = time.perf_counter()
        run_micro_batches(learner, [batch], 1)
        spent = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        return float(spent)


Sample = tuple[int, list[int]]
"""(ring size, lengths) of a micro-batch to measure."""


def samples(world: int, capacity: int, number: int) -> list[Sample]:
    """Micro-batches of all ring sizes, from nearly empty to full, of short and long sequences."""
    generator, found = np.random.default_rng(world), []
    sizes = [size for size in (1, 2, 4) if size <= world]
    for index in range(number):
        size = sizes[index % len(sizes)]
        room = int(size * capacity * generator.uniform(0.1, 1.0))
        kind = Batches(int(np.exp(generator.uniform(np.log(24), np.log(1500)))), 1.0, 0)
        found.append((size, kind.draw(index, room)))
    whole = [(size, [min(size * capacity, CONTEXT)]) for size in sizes]
    return found + whole + [(1, [16]), (world, [16])]


class Calibration:
    """Times of the same micro-batches, repeated whenever asked, and the model fitted to them."""

    def __init__(self, bench: Bench, number: int) -> None:
        self._bench = bench
        self.samples = samples(bench.ranks.world, bench.capacity, number)
        self._seconds: list[list[float]] = [[] for _ in self.samples]
        self._tiny: list[float] = []

    def measure(self, show: Callable[[str], None]) -> None:
        """Time every sample once more, and a step with next to nothing in it."""
        for index, (size, lengths) in enumerate(self.samples):
            show("calibration")
            self._seconds[index].append(self._bench.micro_batch(size, lengths))
        lengths = [16] * self._bench.ranks.world
        plan = PLANNERS["longest_first"](self._bench.problem(lengths))
        self._tiny.append(self._bench.step_s(plan, lengths))

    def fit(self) -> tuple[CostModel, float, float]:
        """The cost model, seconds of a step beside its micro-batches, and the median error of
        samples that the fit has not seen. The same on all ranks."""
        measured = [
            Measurement(tuple(lengths), size, True, tuple(seconds))
            for (size, lengths), seconds in zip(self.samples, self._seconds, strict=True)
        ]
        fit = fit_cost(measured, node_size=8)
        step_s = statistics.median(self._tiny) - fit.cost.ring_s([16], [0])
        return fit.cost, max(0.0, step_s), float(np.median(np.abs(fit.left_out_errors)))


def compare(bench: Bench, name: str, rounds: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Rounds of one kind of batch, a new draw in each, under every planner in turn."""
    from megascale.training.compare import compare_planners

    batches = [batch_of(BATCHES[name].draw(turn)) for turn in range(rounds + 1)]
    done = compare_planners(
        bench.trainers, COMPARED, batches, bench.problem, lambda planner: show(f"{name} {planner}")
    )
    times = {planner: [one.steps[planner] for one in done] for planner in COMPARED}
    static_s = np.array([one.plans["static"].predicted_s for one in done])
    ours = [one.plans["hybrid"] for one in done]
    return {
        "ranks": bench.ranks.world,
        "batch": name,
        "rounds": rounds,
        "loss_difference": max(one.loss_difference for one in done),
        "predicted_over_static": float(np.median(static_s / [one.predicted_s for one in ours])),
        "most_possible_over_static": float(
            np.median(static_s / [one.lower_bound_s for one in ours])
        ),
        "planners": {
            planner: _row(times[planner], times["static"], bench.ranks.world)
            for planner in COMPARED
        },
    }


def _row(steps: Sequence[TimedStep], static: Sequence[TimedStep], world: int) -> dict[str, float]:
    """What steps of `world` ranks took, beside those of static plans on the same batches."""
    taken_s = statistics.median(one.seconds for one in steps)
    over = Ratio.of([one.seconds for one in static], [one.seconds for one in steps])
    worked = Ratio.of([one.processor_s for one in static], [one.processor_s for one in steps])
    return {
        "step_s": taken_s,
        "tokens_per_s": BATCH_TOKENS / taken_s,
        "over_static": over.median,
        "least_over_static": over.least,
        "most_over_static": over.most,
        "processor_s": statistics.median(one.processor_s for one in steps) / world,
        "processor_over_static": worked.median,
    }


def profile(bench: Bench, name: str, planner: str) -> dict[str, float]:
    """Seconds of one step on this rank by kind of work; ranks stand still in the last two."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    lengths = BATCHES[name].draw(1)
    plan = PLANNERS[planner](bench.problem(lengths))
    with record(activities=[ProfilerActivity.CPU]) as recorded:
        bench.step_s(plan, lengths)
    shares = dict.fromkeys(KERNELS, 0.0) | {"everything else": 0.0}
    for event in recorded.key_averages():
        kind = (k for k, words in KERNELS.items() if any(word in event.key for word in words))
        shares[next(kind, "everything else")] += event.self_cpu_time_total * 1e-6
    return shares


def truth(
    bench: Bench, calibration: Calibration, number: int, passes: int, show: Callable[[str], None]
) -> dict[str, Any]:
    """Predicted and measured steps of mixed batches.

    Each pass measures the batches and the calibration's samples, so that both are medians over
    the same minutes of a machine that others use too (the least time would flatter the short
    samples, which slip between what others do). Planned is with the first calibration.
    """
    drawn = [_mixed(seed) for seed in range(number)]
    plans = [PLANNERS["hybrid"](bench.problem(lengths)) for lengths in drawn]
    measured: list[list[float]] = [[] for _ in drawn]
    for _ in range(passes):
        calibration.measure(show)
        for lengths, plan, seconds in zip(drawn, plans, measured, strict=True):
            show("predicted against measured")
            seconds.append(bench.step_s(plan, lengths))
    cost, beside_s, fit_error = calibration.fit()
    predicted = [
        step_s(plan, lengths, cost) + beside_s for plan, lengths in zip(plans, drawn, strict=True)
    ]
    taken = [statistics.median(seconds) for seconds in measured]
    errors = np.abs(np.array(predicted) / np.array(taken) - 1)
    spread = [max(seconds) / min(seconds) - 1 for seconds in measured]
    return {
        "ranks": bench.ranks.world,
        "passes": passes,
        "median_error": float(np.median(errors)),
        "max_error": float(errors.max()),
        "spread": float(np.median(spread)),
        "fit_error": fit_error,
        "beside_micro_batches_s": beside_s,
        "cost": {k: v for k, v in vars(cost).items() if v and k != "calibrated"},
        "predicted_s": predicted,
        "measured_s": taken,
    }


def _mixed(seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    tokens = int(generator.integers(CONTEXT + 512, 10240))
    return MIXED[seed % len(MIXED)].draw(seed, tokens)


def run_rank(world: int, quick: bool, answer: Path) -> None:
    """What each rank does; the first writes the results to `answer`."""
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    bench, names = Bench(world), list(BATCHES)[1:] if quick else list(BATCHES)
    rounds, passes, number = (1, 1, 8) if quick else (5, 2, 20)
    profiled = [(name, planner) for name in names[:1] for planner in ("static", "hybrid")]
    calibration = Calibration(bench, 6 if quick else 12)
    per_pass = len(calibration.samples)
    total = per_pass + len(names) * (rounds + 1) * len(COMPARED) + len(profiled)
    total += passes * (per_pass + number) if world == TRUTH_RANKS else 0
    progress = Progress(total)

    def show(what: str) -> None:
        if bench.ranks.rank == 0:
            progress.show(f"{world} ranks: {what}")

    bench.micro_batch(1, [64])  # what is made once is made now
    calibration.measure(show)
    bench.cost, _, _ = calibration.fit()
    results: dict[str, Any] = {"compared": [], "profiles": [], "truth": None}
    for name in names:
        results["compared"].append(compare(bench, name, rounds, show))
    for name, planner in profiled:
        show(f"profile of {planner}")
        about = {"ranks": world, "batch": name, "planner": planner}
        results["profiles"].append(about | {"seconds": profile(bench, name, planner)})
    if world == TRUTH_RANKS:
        results["truth"] = truth(bench, calibration, number, passes, show)
    if bench.ranks.rank == 0:
        progress.end()
        answer.write_text(json.dumps(results), encoding="utf-8")
    distributed.stop()


def launch(world: int, quick: bool) -> dict[str, Any]:
    """Run this file on `world` ranks; what the first of them found."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), __file__, "--answer", str(answer)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        subprocess.run([*command, *["--quick"] * quick], check=True, env=environment)
        return json.loads(answer.read_text(encoding="utf-8"))


def about_batches() -> dict[str, str]:
    """The batches for people, by name."""
    return {name: f"{one.describe()}; {BATCH_TOKENS} in all" for name, one in BATCHES.items()}


def report(results: dict[str, Any]) -> Iterator[str]:
    """The tables, a line each."""
    yield "ranks batch    planner      step s  tokens/s  over static (least-most)  processor s"
    for one in results["compared"]:
        for planner, row in one["planners"].items():
            between = f"({row['least_over_static']:.2f}-{row['most_over_static']:.2f})"
            yield (
                f"{one['ranks']:<5} {one['batch']:<8} {planner:<12} {row['step_s']:6.2f} "
                f"{row['tokens_per_s']:9.0f}  {row['over_static']:6.2f}x {between:<18} "
                f"{row['processor_s']:6.2f} ({row['processor_over_static']:.2f}x)"
            )
        goal = GOALS.get(one["batch"], LONG_TAILED_GOAL)
        reached = one["planners"]["hybrid"]["over_static"]
        word = "reached" if reached >= goal else "NOT reached"
        yield (
            f"      {one['batch']}: {reached:.2f}x, goal {goal}x {word}; predicted "
            f"{one['predicted_over_static']:.2f}x, of at most "
            f"{one['most_possible_over_static']:.2f}x by the lower bound; losses differ by "
            f"{one['loss_difference']:.1e} (goal: at most {LOSS_GOAL})"
        )
    for one in results["profiles"]:
        whole = sum(one["seconds"].values())
        parts = ", ".join(f"{k} {v:.2f} s ({v / whole:.0%})" for k, v in one["seconds"].items())
        yield f"profile, {one['ranks']} ranks, {one['batch']}, {one['planner']}: {parts}"
    found = results["truth"]
    if found is None:
        return
    yield (
        f"predicted against measured, {found['ranks']} ranks, {len(found['measured_s'])} mixed "
        f"batches: median error {found['median_error']:.1%} (goal: {TRUTH_GOAL:.0%}), max "
        f"{found['max_error']:.1%}; fit on samples left out "
        f"{found['fit_error']:.1%}; the slowest of {found['passes']} passes over the "
        f"fastest: {1 + found['spread']:.2f}x"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens per second under each planner, and predicted over measured steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    bars, points = figure.subplots(1, 2, width_ratios=(1.8, 1))
    _draw_bars(bars, results["compared"])
    _draw_truth(points, results["truth"])
    for axes in (bars, points):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Axes, compared: Sequence[dict[str, Any]]) -> None:
    for position, planner in enumerate(COMPARED):
        rows = [one["planners"][planner] for one in compared]
        at = np.arange(len(rows)) + 0.27 * (position - 1)
        heights = [row["tokens_per_s"] for row in rows]
        drawn = axes.bar(at, heights, 0.25, color=COLOURS[planner], label=planner)
        axes.bar_label(drawn, [f"{row['over_static']:.2f}x" for row in rows], fontsize=8)
    axes.set_xticks(range(len(compared)), [f"{o['batch']}\n{o['ranks']} ranks" for o in compared])
    axes.set_ylabel("tokens/s")
    title = "Training steps on CPU ranks, one thread each; ratio: median over rounds of static"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)


def _draw_truth(axes: Axes, found: dict[str, Any]) -> None:
    limit = 1.1 * max(*found["measured_s"], *found["predicted_s"])
    line = np.array([0.0, limit])
    axes.fill_between(line, line * 0.9, line * 1.1, color="#eeeeee", label="within 10 %")
    axes.plot(line, line, color="#b0b0b0", linewidth=1)
    axes.plot(found["measured_s"], found["predicted_s"], "o", color="#d6604d", markersize=4)
    axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="measured step, s", ylabel="predicted, s")
    title = f"{found['ranks']} ranks, mixed batches: median error {found['median_error']:.1%}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)


def to_json(results: dict[str, Any]) -> str:
    """All results, an entry a line, of four digits."""
    lines = []
    for key, value in results.items():
        value = _rounded(value)
        if isinstance(value, list):
            lines.append(
                f' "{key}": [\n' + ",\n".join(f"  {json.dumps(v)}" for v in value) + "\n ]"
            )
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of `bench.py hdp`."""
    parser = argparse.ArgumentParser(prog="bench.py hdp", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 ranks, few rounds, nothing kept")
    parser.add_argument("--out", type=Path, help="folder; default: configs/results, if not quick")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out or (None if options.quick else RESULTS)
    return options


def bench_hdp(arguments: Sequence[str]) -> None:
    """Run on 2 and on 4 ranks, print the tables, and write JSON and picture."""
    options = parse(arguments)
    worlds, began = ([2] if options.quick else [2, 4]), time.perf_counter()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load average {os.getloadavg()[0]:.1f} (others' work included)")
    if cores < max(worlds):
        print(f"{max(worlds)} ranks share {cores} cores: there a ratio is one of total work, not")
        print("of balance, since a rank that waits leaves its core to another")
    for name, about in about_batches().items():
        print(f"{name:<8} {about}", flush=True)
    answers = []
    for world in worlds:
        answers.append(launch(world, options.quick))
        print(*report(answers[-1]), sep="\n", flush=True)
    results: dict[str, Any] = {
        "machine": f"{cores} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_average_at_end": os.getloadavg()[0],
        "model": "4 layers of 128, fp32",
        "batches": about_batches(),
        "compared": [row for answer in answers for row in answer["compared"]],
        "profiles": [row for answer in answers for row in answer["profiles"]],
        "truth": answers[worlds.index(TRUTH_RANKS)]["truth"],
    }
    print(f"{time.perf_counter() - began:.0f} s, load average {os.getloadavg()[0]:.1f} at the end")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "hdp.json").write_text(to_json(results), encoding="utf-8")
        plot(results, options.out / "hdp.png")
        print(f"written: {options.out}/hdp.json, {options.out}/hdp.png")


def main() -> None:
    """As a rank where an answer is asked for, else as the bench."""
    options = parse(sys.argv[1:])
    if options.answer:
        run_rank(int(os.environ["WORLD_SIZE"]), options.quick, options.answer)
    else:
        bench_hdp(sys.argv[1:])


if __name__ == "__main__":
    main()
