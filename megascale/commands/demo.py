"""`megascale demo`: static context parallelism against hybrid on the same batches, measured."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megascale.config import Layout, RunConfig
from megascale.errors import UserError
from megascale.launch.local_ranks import (
    RankJob,
    as_rank,
    megascale,
    rank_count,
    ranks_that_fit,
    run_ranks,
)
from megascale.monitor.comparison import Comparison, Setting
from megascale.monitor.quantities import show_duration
from megascale.planner import CostModel
from megascale.planner.fit import fit_cost
from megascale.planner.stacked_gantt import TitledPlan, plot_stacked
from megascale.run.preflight import check_ranks
from megascale.run.resolve import ResolvedRun, load_run
from megascale.run.step_problem import batches_of, cost_model, step_problem
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs
from megascale.runtime.signals import TWIN_S, StopRequest

if TYPE_CHECKING:
    from megascale.corpus.batches import GlobalBatch
    from megascale.runtime.distributed import Ranks

CONFIG, OUT, RANKS = "configs/mixed_lengths.yaml", "runs/demo", "4"
OURS, BASELINES = "hybrid", ("static", "static_best")
PLANNERS = (*BASELINES, OURS)
CAPACITY = "planner.capacity_tokens"
"""An option that is an equal share of the context where it is not given on the command line."""
REPEATS = 5
CALIBRATION_S, CALIBRATION_REPEATS = 10.0, 2
TELL_EVERY_S = 5.0
RESULT = json_of("a comparison of megascale demo", "megascale", "rounds", "ratios")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale demo`."""
    add = parser.add_argument
    add("overrides", nargs="*", metavar="a.b=c", help="options that replace those of the config")
    ranks = "start so many ranks on this machine, on its cores or one for a CUDA device; default: 4"
    add("--ranks", metavar="N", help=ranks)
    add("--out", default=OUT, metavar="DIR", help=f"folder of what is written; default: {OUT}")
    add("--config", default=CONFIG, metavar="CONFIG", help=f"default: {CONFIG}")


def run_demo(args: argparse.Namespace) -> int:
    """Measure, print, write JSON and picture; returns the exit status.

    Raises UserError for bad input, and RuntimeError where losses differ by more than rounding.
    """
    if "WORLD_SIZE" in os.environ:
        rank_count(args.ranks)
        return as_rank(partial(_compare_on_rank, args))
    count = ranks_that_fit(args.ranks or RANKS, "--ranks")
    if count < 2:
        raise UserError(f"--ranks {count}: one rank shares nothing; give 2 or more, such as 4")
    asked = StopRequest(echo_s=TWIN_S)
    try:
        require_outputs(_outputs(args.out), [args.config])
        config = load_run(args.config, args.overrides).config
        check_ranks(config, count)
        cost_model(config)  # a bad cost file is found before ranks are started
        return run_ranks(_job(args, count), asked)
    finally:
        asked.restore()


def _outputs(out: str) -> list[Output]:
    kinds = {"demo.json": RESULT, "demo.png": picture()}
    return [Output("--out", Path(out) / name, kind, True) for name, kind in kinds.items()]


def _job(args: argparse.Namespace, count: int) -> RankJob:
    words = ["demo", *args.overrides, "--config", args.config, "--out", args.out]
    again = shlex.join(["megascale", *words, "--ranks", str(count)])
    return RankJob(
        megascale(*words), count, Path(args.out) / "logs", f"start it again with: {again}"
    )


def _compare_on_rank(args: argparse.Namespace) -> int:
    run = load_run(args.config, args.overrides)
    from megascale.runtime import distributed
    from megascale.runtime.environment import world_from_environment

    distributed.prepare_device(run.config.device)
    config = run.config
    if not any(word.startswith(f"{CAPACITY}=") for word in args.overrides):
        config = with_shared_context(config, world_from_environment()[1])
    ranks = distributed.start(config)
    try:
        return _compare(args, run._replace(config=config), ranks)
    finally:
        distributed.stop()


def with_shared_context(config: RunConfig, world: int) -> RunConfig:
    """`config` with as little capacity as the context allows: an equal share on each rank.

    So the longest sequence needs all ranks of the HDP axis, as on a cluster whose ranks are just
    enough for the context.
    """
    share = -(-config.data.context_tokens // Layout.of(config, world).hdp)
    return replace(config, planner=replace(config.planner, capacity_tokens=share))


def _compare(args: argparse.Namespace, run: ResolvedRun, ranks: Ranks) -> int:
    from megascale.runtime.first_rank import on_first_rank
    from megascale.training.begin import token_sources
    from megascale.training.compare import Trainers, compare_planners

    config, say = run.config, partial(print, flush=True) if ranks.rank == 0 else _say_nothing
    setting = _setting(config, ranks)
    for line in _introduction(config, setting):
        say(line)
    cost, error = _costs(config, ranks, say)
    batches = list(islice(_batches(run), REPEATS + 1))
    rounds = compare_planners(
        Trainers(config, ranks, token_sources(config, run.sources), PLANNERS),
        PLANNERS,
        batches,
        lambda lengths: replace(step_problem(config, ranks.layout, lengths), cost=cost),
        Progress(len(batches) * len(PLANNERS), say).show,
    )
    result = Comparison(setting, BASELINES, OURS, cost, error, rounds)
    on_first_rank(ranks, lambda: _tell(result, Path(args.out)))
    if not result.losses_agree:
        raise RuntimeError("plans of the same batches gave other losses, a fault of megascale")
    return 0


def _say_nothing(line: str) -> None:
    """On all ranks but the first."""


def _setting(config: RunConfig, ranks: Ranks) -> Setting:
    import torch

    on_gpu = ranks.device.type == "cuda"
    mine = len(os.sched_getaffinity(0))
    return Setting(
        ranks=ranks.world,
        device=torch.cuda.get_device_name(ranks.device) if on_gpu else "cpu",
        cores=max(mine, os.cpu_count() or 1),
        usable_cores=min(mine, ranks.world * torch.get_num_threads()),
        precision=config.train.precision,
        capacity_tokens=config.planner.capacity_tokens or 0,
        context_tokens=config.data.context_tokens,
        corpora=tuple(dict.fromkeys(one.path for one in config.data.sources.values())),
    )


def _introduction(config: RunConfig, setting: Setting) -> Iterator[str]:
    model, ranks = config.model, setting.ranks
    yield "static context parallelism against hybrid data parallelism, on the same batches"
    yield (
        f"{ranks} ranks ({setting.device}, {setting.precision}), {model.num_layers} layers of "
        f"{model.hidden_size}, documents of {', '.join(setting.corpora)} in the order of a run"
    )
    yield (
        f"a rank holds {setting.capacity_tokens:,} tokens and the context is "
        f"{setting.context_tokens:,}: a static plan has one ring size for all sequences"
    )
    if setting.device == "cpu" and ranks > setting.usable_cores:
        yield (
            f"{ranks} ranks share {setting.usable_cores} cores: a ratio is one of total work more "
            "than of balance, since a rank that waits leaves its core to another"
        )


def _costs(
    config: RunConfig, ranks: Ranks, say: Callable[[str], None]
) -> tuple[CostModel, float | None]:
    """The cost model of the config, or one that is measured here, with the error of its fit."""
    if config.planner.cost is not None:
        return cost_model(config), None
    from megascale.training.calibrate import calibrate

    done = calibrate(
        config,
        ranks,
        None,
        CALIBRATION_REPEATS,
        CALIBRATION_S,
        lambda line: say(f"calibration, {line}"),
    )
    fit = fit_cost(done.measurements, done.node_size)
    error = float(np.median(np.abs(fit.left_out_errors)))
    say(f"calibrated in {done.seconds:.0f} s: predictions of micro-batches are {error:.0%} off")
    return fit.cost, error


def _batches(run: ResolvedRun) -> Iterator[GlobalBatch]:
    """Those of the run, from its first step on."""
    from megascale.corpus.batches import Cursor

    batches, cursor = batches_of(run.config, run.sources), Cursor()
    while True:
        batch, cursor = batches.next(cursor)
        yield batch


class Progress:
    """Says now and then how far the steps are, and about how long they still take."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say, self._done = total, say, 0
        self._began = self._told = time.monotonic()

    def show(self, planner: str) -> None:
        """Take note that a step begins."""
        now = time.monotonic()
        if self._done and now - self._told > TELL_EVERY_S:
            left_s = (now - self._began) / self._done * (self._total - self._done)
            eta = show_duration(left_s)
            self._say(f"step {self._done + 1} of {self._total} ({planner}), ETA {eta}")
            self._told = now
        self._done += 1


def _tell(result: Comparison, out: Path) -> None:
    """Print the result and write its files. Raises OSError."""
    for line in result.lines():
        print(line, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_output(out / "demo.json", json.dumps(result.to_json(), indent=1) + "\n")
    draw(result, out / "demo.png")
    print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}: the plans of the first batch")


def draw(result: Comparison, path: Path) -> None:
    """The first batch under the static plan and under ours, on one time axis."""
    first, setting, reason = result.rounds[0], result.setting, result.no_ratio
    lengths = first.batch.length
    titles = {"static": "static context parallelism", OURS: "hybrid data parallelism"}
    plans = []
    for name, title in titles.items():
        times = f"predicted {first.plans[name].predicted_s:.2f} s"
        if reason is None:
            times += f", measured {first.steps[name].seconds:.2f} s"
        plans.append(TitledPlan(f"{title}: {times}", first.plans[name]))
    title = (
        f"{len(lengths)} sequences of {int(lengths.min()):,} to {int(lengths.max()):,} tokens on "
        f"{setting.ranks} ranks ({setting.device}), from {', '.join(setting.corpora)}"
    )
    if reason is None:
        title += f"\n{OURS} is {result.ratios['static']} as fast over {len(result.rounds)} batches"
    plot_stacked(plans, lengths, result.cost, title, path)
