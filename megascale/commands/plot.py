"""`megascale plot`: draw the curves of one or more runs, or the schedule of one to come."""

from __future__ import annotations

import argparse
from pathlib import Path

from megascale.config import RunConfig, StageConfig, finalize, load_config
from megascale.errors import UserError
from megascale.optim import steplaw
from megascale.run.ancestry import earlier_parts
from megascale.run.resolve import load_run
from megascale.runtime.outputs import Output, picture, require_outputs


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale plot`."""
    folders = "run folder; several share axes (with --schedule: a.b=c, options of the config)"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=folders)
    parser.add_argument(
        "--schedule",
        metavar="CONFIG",
        help="draw the learning rate and the stages of the data of this config instead",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the pictures; default: RUN/plots, or plots/compared of the first of "
        "several. With --schedule a PNG file; default: CONFIG_schedule.png here",
    )


def run_plot(args: argparse.Namespace) -> int:
    """Draw and name the files; returns the exit status. Raises UserError for bad input."""
    if args.schedule is not None:
        return _draw_schedule(args)
    if not args.runs:
        raise UserError("plot: give RUN, the folder of a run, or --schedule CONFIG")
    runs = [Path(run) for run in args.runs]
    beside = runs[0] / "plots"
    out = Path(args.out) if args.out else beside / "compared" if len(runs) > 1 else beside
    from megascale.monitor.plots import plot_run

    try:
        written = plot_run(runs, out, {run: earlier_parts(run) for run in runs})
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder you may write") from None
    for path in written:
        print(f"wrote {path}")
    return 0


def _draw_schedule(args: argparse.Namespace) -> int:
    from megascale.monitor.schedule_plot import plot_schedule

    out = Path(args.out or f"{Path(args.schedule).stem}_schedule.png")
    output = Output("--out", out, picture(".png"), makes_folders=True)
    require_outputs([output], [args.schedule])
    config, stages = _resolved(args.schedule, args.runs)
    title = f"Learning rate{' and data' if stages else ''} - {Path(config.run_dir).name}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot_schedule(config, stages, title, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a file you may write") from None
    print(f"wrote {out}")
    return 0


def _resolved(path: str, overrides: list[str]) -> tuple[RunConfig, tuple[StageConfig, ...]]:
    """A finalized config, and its stages as far as they are known.

    One that starts from a checkpoint takes from it what it replays, and at which rate it anneals.
    """
    config = load_config(path, overrides)
    if config.start.checkpoint is not None:
        config = load_run(path, overrides).config
        return config, config.data.stages
    config = steplaw.resolve(config)
    tokens = _source_tokens(config)
    weights = tokens or dict.fromkeys(config.data.sources, 1)
    config = finalize(config, weights, config.model.vocab_size or 1)
    return config, config.data.stages if tokens else ()


def _source_tokens(config: RunConfig) -> dict[str, int]:
    """Tokens of the sources, which decide their shares where no stage does.

    Only there are the corpora looked at; empty, with a line that says so, where one is missing.
    """
    sources = config.data.sources
    if config.data.stages or len(sources) == 1:
        return dict.fromkeys(sources, 1)
    from megascale.corpus.sources import SourceInfo

    try:
        return {name: SourceInfo.of(one).train_tokens for name, one in sources.items()}
    except UserError as error:
        print(f"without data.stages the shares follow from the corpora, so left out: {error}")
        return {}
