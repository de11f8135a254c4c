"""`megascale calibrate`: measure what micro-batches take on this machine, for the planner."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.commands.train import add_ranks_argument
from megascale.config import RunConfig, dump_config, finalize, load_config
from megascale.errors import UserError
from megascale.launch.local_ranks import RankJob, as_rank, megascale, rank_count, run_ranks
from megascale.optim import steplaw
from megascale.planner.fit import GOOD_ERROR, Fit, fit_cost, fit_table, write_cost
from megascale.run.preflight import check_ranks
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs
from megascale.runtime.signals import TWIN_S, StopRequest

if TYPE_CHECKING:
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
        check_ranks(_load(args.config, args.overrides), count)
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
    config = _load(args.config, args.overrides)
    from megascale.runtime import distributed

    distributed.prepare_device(config.device)
    ranks = distributed.start(config)
    try:
        _run(args, config, ranks, lengths)
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


def _load(path: str, overrides: Sequence[str]) -> RunConfig:
    """The finalized config; its corpora are looked at only where they give the vocabulary."""
    config = steplaw.resolve(load_config(path, overrides))
    if config.model.vocab_size is None:
        from megascale.run.resolve import load_run

        try:
            return load_run(path, overrides).config
        except UserError as error:
            raise UserError(f"{error} (or set model.vocab_size, which needs no corpus)") from None
    return finalize(config, dict.fromkeys(config.data.sources, 1), config.model.vocab_size)


def _run(
    args: argparse.Namespace, config: RunConfig, ranks: Ranks, lengths: list[int] | None
) -> None:
    from megascale.runtime.first_rank import on_first_rank
    from megascale.training.calibrate import calibrate

    def say(line: str) -> None:
        if ranks.rank == 0:
            print(line, flush=True)

    on_first_rank(ranks, lambda: _check_writable(args))
    layout = ranks.layout
    say(
        f"calibrate on {layout.world} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} "
        f"x HDP {layout.hdp}, {_device(ranks)}, {config.train.precision}"
    )
    done = calibrate(config, ranks, lengths, args.repeats, args.minutes * 60, say)
    fit = fit_cost(done.measurements, done.node_size, 0.0 if args.fastest else 0.5)
    for line in [*fit_table(done.measurements, fit), *_summary(args, done, fit)]:
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


def _summary(args: argparse.Namespace, done: Calibration, fit: Fit) -> list[str]:
    """The coefficients, the errors and everything the user should know of them."""
    values = {name: value for name, value in asdict(fit.cost).items() if name != "calibrated"}
    noise = float(np.median([one.noise for one in done.measurements]))
    lines = [
        f"{len(done.measurements)} micro-batches, {_counts(args)} of {done.repeats}, in "
        f"{done.seconds:.0f} s" + f"; no time for {done.left_out} more" * bool(done.left_out),
        "  " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()),
        f"  error                 median {_median(fit.errors):.1%}, largest "
        f"{np.abs(fit.errors).max():.1%}",
        f"  error, left out       median {_median(fit.left_out_errors):.1%}, largest "
        f"{np.abs(fit.left_out_errors).max():.1%} (each predicted from the others)",
        f"  noise                 median {noise:.1%} between repeats",
    ]
    if fit.unidentified:
        lines.append(f"  not told by this grid, so 0: {', '.join(fit.unidentified)}")
    if fit.copied:
        lines.append(f"  no ring crossed nodes, so as within a node: {', '.join(fit.copied)}")
    if not fit.is_good:
        lines.append(
            f"warning: the median error is above {GOOD_ERROR:.0%}; calibrate on a machine that "
            "does nothing else, with more --repeats and --minutes, or with --fastest"
        )
    return lines


def _counts(args: argparse.Namespace) -> str:
    return "fastest" if args.fastest else "median"


def _median(errors: Any) -> float:
    return float(np.median(np.abs(errors)))


def _write(
    args: argparse.Namespace, config: RunConfig, ranks: Ranks, done: Calibration, fit: Fit
) -> None:
    report = _report_path(args.out)
    write_cost(fit.cost, args.out)
    value = _report(config, ranks, done, fit) | {"counts": _counts(args)}
    write_output(report, json.dumps(value, indent=1) + "\n")
    written = [args.out, str(report)]
    if args.plot is not None:
        plot_fit(done, fit, args.plot)
        written.append(args.plot)
    print(f"wrote {', '.join(written)}; use it with planner.cost={args.out}")


def _report(config: RunConfig, ranks: Ranks, done: Calibration, fit: Fit) -> dict[str, Any]:
    import torch

    layout, text = ranks.layout, json.dumps(dump_config(config), sort_keys=True, default=str)
    return {
        "machine": {
            "device": _device(ranks),
            "threads_per_rank": torch.get_num_threads(),
            "ranks": layout.world,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "hdp": layout.hdp,
        },
        "precision": config.train.precision,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "cost": asdict(fit.cost),
        "median_error": _median(fit.errors),
        "median_left_out_error": _median(fit.left_out_errors),
        "unidentified": fit.unidentified,
        "copied": fit.copied,
        "repeats": done.repeats,
        "seconds": done.seconds,
        "measurements": [
            {
                **asdict(one),
                "measured_s": float(measured),
                "predicted_s": float(predicted),
                "left_out_s": float(left_out),
            }
            for one, measured, predicted, left_out in zip(
                done.measurements, fit.measured_s, fit.predicted_s, fit.left_out_s, strict=True
            )
        ],
    }


def _device(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(ranks.device)
    return processor_name()


def processor_name() -> str:
    """The model of this machine's CPU, as Linux tells it; else what Python knows."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def plot_fit(done: Calibration, fit: Fit, path: str) -> None:
    """Draw predicted against measured seconds, a colour for each ring size."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from megascale.monitor.plots import COLOURS, MARKERS, STYLE

    sizes = np.array([one.size for one in done.measurements])
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        ends = [fit.measured_s.min() / 1.3 * 1e3, fit.measured_s.max() * 1.3 * 1e3]
        axes.plot(ends, ends, color="#9a9a9a", linewidth=1.0, zorder=1)
        for index, size in enumerate(np.unique(sizes)):
            chosen = sizes == size
            axes.loglog(
                fit.measured_s[chosen] * 1e3,
                fit.predicted_s[chosen] * 1e3,
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                alpha=0.8,
                label=f"ring of {size}",
            )
        axes.set_xlabel("measured, ms")
        axes.set_ylabel("predicted, ms")
        axes.set_title(f"Micro-batches: median error {_median(fit.errors):.1%}")
        axes.legend()
        figure.savefig(path)
