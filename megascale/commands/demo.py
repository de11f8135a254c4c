"""`megascale demo`: static context parallelism against hybrid on the same batches, measured."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from functools import partial
from pathlib import Path

from megascale.errors import UserError
from megascale.launch.local_ranks import (
    RankJob,
    as_rank,
    megascale,
    rank_count,
    ranks_that_fit,
    run_ranks,
)
from megascale.monitor.comparison import Comparison, plot_comparison
from megascale.run.preflight import check_ranks
from megascale.run.resolve import load_run
from megascale.run.step_problem import check_cost, with_shared_context
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs
from megascale.runtime.signals import TWIN_S, StopRequest

CONFIG, OUT, RANKS = "configs/mixed_lengths.yaml", "runs/demo", "4"
OURS, BASELINES = "hybrid", ("static", "static_best")
CAPACITY = "planner.capacity_tokens"
"""An option that is an equal share of the context where it is not given on the command line."""
REPEATS = 5
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
        check_cost(config)  # a bad cost file is found before ranks are started
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
    from megascale.runtime.first_rank import on_first_rank
    from megascale.training.capacity import with_own_capacity
    from megascale.training.compare import compare_on_ranks

    config = run.config
    if not any(word.startswith(f"{CAPACITY}=") for word in args.overrides):
        config = with_shared_context(config, world_from_environment()[1])
    ranks = distributed.start(config)
    try:
        say = partial(print, flush=True) if ranks.rank == 0 else _say_nothing
        run = run._replace(config=with_own_capacity(config, ranks))
        result = compare_on_ranks(run, ranks, BASELINES, OURS, REPEATS, say)
        on_first_rank(ranks, lambda: _tell(result, Path(args.out)))
    finally:
        distributed.stop()
    if not result.losses_agree:
        raise RuntimeError("plans of the same batches gave other losses, a fault of megascale")
    return 0


def _say_nothing(line: str) -> None:
    """On all ranks but the first."""


def _tell(result: Comparison, out: Path) -> None:
    """Print the result and write its files. Raises OSError."""
    for line in result.lines():
        print(line, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_output(out / "demo.json", json.dumps(result.to_json(), indent=1) + "\n")
    plot_comparison(result, out / "demo.png")
    print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}: the plans of the first batch")
