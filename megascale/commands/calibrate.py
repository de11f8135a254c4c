"""`megascale calibrate`: measure what micro-batches take on this machine, for the planner."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.commands.train import add_ranks_argument
from megascale.errors import UserError
from megascale.launch.local_ranks import RankJob, as_rank, megascale, rank_count, run_ranks
from megascale.planner.fit import Fit, fit_cost, fit_table, write_cost
from megascale.run.preflight import check_ranks, config_for_calibration
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs
from megascale.runtime.signals import TWIN_S, StopRequest

if TYPE_CHECKING:
    from megascale.config import RunConfig
    from megascale.runtime.distributed import Ranks
    from megascale.training.calibrate import Calibration

COST = json_of("a cost model of megascale calibrate", "a", "b", "node_size")
REPORT = json_of("a report of megascale calibrate", "machine", "cost", "measurements")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale calibrate`."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file of the run")
    change = "options that replace those of the file"
    add("overrides", nargs="*", metavar="a.b=c", help=change)
    out = "where the cost model goes; OUT.report.json beside it tells what was measured"
    add("--out", metavar="COST.json", default="COST.json", help=out)
    lengths = "tokens of the sequences to measure; default: the context and its halves"
    add("--lengths", metavar="L1,L2,...", help=lengths)
    add("--repeats", type=int, default=3, metavar="N", help="default: 3; medians count")
    fastest = "the fastest repeat counts, where other programs use this machine too"
    add("--fastest", action="store_true", help=fastest)
    minutes = "about how long it may take; the grid is thinned to that (default: 3)"
    add("--minutes", type=float, default=3.0, metavar="M", help=minutes)
    add("--plot", metavar="PNG", help="draw predicted against measured times")
    add_ranks_argument(parser)


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure, fit and write; returns the exit status. Raises UserError for bad input."""
    lengths = _lengths(args.lengths)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes:g}: must be above 0, such as 3")
    count = rank_count(args.ranks)
    if count == 1:
        return as_rank(partial(_calibrate, args, lengths))
    asked = StopRequest(echo_s=TWIN_S)
    try:
        _check_writable(args)
        check_ranks(config_for_calibration(args.config, args.overrides), count)
        return run_ranks(_job(args, count), asked)
    finally:
        asked.restore()


def _job(args: argparse.Namespace, count: int) -> RankJob:
    """The same command for each of `count` ranks."""
    given = {name: getattr(args, name) for name in ("out", "lengths", "repeats", "minutes", "plot")}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    words = ["calibrate", args.config, *args.overrides, *options, *["--fastest"] * args.fastest]
    again = shlex.join(["megascale", *words, "--ranks", str(count)])
    logs = Path(args.out).with_suffix(".logs")
    return RankJob(megascale(*words), count, logs, f"start it again with: {again}")


def _calibrate(args: argparse.Namespace, lengths: list[int] | None) -> int:
    config = config_for_calibration(args.config, args.overrides)
    from megascale.runtime import distributed

    distributed.prepare_device(config.device)
    from megascale.training.capacity import with_own_capacity

    ranks = distributed.start(config)
    try:
        _run(args, with_own_capacity(config, ranks), ranks, lengths)
    finally:
        distributed.stop()
    return 0


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 2**31 for word in words):
        raise UserError(f"--lengths {text}: give whole numbers of tokens, such as 256,1024,4096")
    return [int(word) for word in words]


def _run(
    args: argparse.Namespace, config: RunConfig, ranks: Ranks, lengths: list[int] | None
) -> None:
    from megascale.runtime.first_rank import on_first_rank
    from megascale.training.calibrate import calibrate
    from megascale.training.calibration_report import device_name, summary_lines

    def say(line: str) -> None:
        if ranks.rank == 0:
            print(line, flush=True)

    on_first_rank(ranks, lambda: _check_writable(args))
    layout = ranks.layout
    say(
        f"calibrate on {layout.world} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} "
        f"x HDP {layout.hdp}, {device_name(ranks)}, {config.train.precision}"
    )
    done = calibrate(config, ranks, lengths, args.repeats, args.minutes * 60, say)
    fit = fit_cost(done.measurements, done.node_size, 0.0 if args.fastest else 0.5)
    for line in [*fit_table(done.measurements, fit), *summary_lines(done, fit, _counts(args))]:
        say(line)
    on_first_rank(ranks, lambda: _write(args, config, ranks, done, fit))


def _report_path(out: str) -> Path:
    return Path(out).with_suffix(".report.json")


def _check_writable(args: argparse.Namespace) -> None:
    """Before minutes are spent on what cannot be kept."""
    outputs = [Output("--out", Path(args.out), COST)]
    outputs.append(Output("--out", _report_path(args.out), REPORT))
    if args.plot is not None:
        outputs.append(Output("--plot", Path(args.plot), picture()))
    require_outputs(outputs, [args.config])


def _counts(args: argparse.Namespace) -> str:
    return "fastest" if args.fastest else "median"


def _write(
    args: argparse.Namespace, config: RunConfig, ranks: Ranks, done: Calibration, fit: Fit
) -> None:
    from megascale.training.calibration_report import plot_fit, report

    path = _report_path(args.out)
    write_cost(fit.cost, args.out)
    value = report(config, ranks, done, fit, _counts(args))
    write_output(path, json.dumps(value, indent=1) + "\n")
    written = [args.out, str(path)]
    if args.plot is not None:
        plot_fit(done, fit, args.plot)
        written.append(args.plot)
    print(f"wrote {', '.join(written)}; use it with planner.cost={args.out}")
