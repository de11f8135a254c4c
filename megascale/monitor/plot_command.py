"""`megascale plot`: draw the curves of one or more runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from megascale.errors import UserError


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale plot`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several share axes")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the pictures; default: RUN/plots, or plots/compared of the first of "
        "several",
    )


def run_plot(args: argparse.Namespace) -> int:
    """Draw and name the files; returns the exit status. Raises UserError for bad input."""
    runs = [Path(run) for run in args.runs]
    beside = runs[0] / "plots"
    out = Path(args.out) if args.out else beside / "compared" if len(runs) > 1 else beside
    from megascale.monitor.plots import plot_run

    try:
        written = plot_run(runs, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder you may write") from None
    for path in written:
        print(f"wrote {path}")
    return 0
