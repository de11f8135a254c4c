"""`megascale plan`: print the whole derived run without starting it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from megascale.config import Layout
from megascale.errors import UserError
from megascale.planner.gantt import plot_gantt
from megascale.train.describe import cost_model, describe_run, first_step, load_run


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale plan`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="options that replace those of the file"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks of the run; default: the fewest that fit"
    )
    parser.add_argument("--json", metavar="OUT", help="write the plan of step 0 to this file")
    parser.add_argument("--gantt", metavar="PNG", help="draw the plan of step 0 into this file")


def run_plan(args: argparse.Namespace) -> int:
    """Print what the run will be; returns the exit status. Raises UserError for bad input."""
    config, sources = load_run(args.config, args.overrides)
    cut = config.parallel
    fewest = cut.tensor * cut.pipeline * cut.expert
    layout = Layout.of(config, fewest if args.ranks is None else args.ranks)
    first = first_step(config, layout, sources)
    print(describe_run(config, layout, sources, first), end="")
    if args.json:
        text = json.dumps(first.plan.to_json()) + "\n"
        _write("--json", args.json, lambda path: path.write_text(text, encoding="utf-8"))
    if args.gantt:
        cost, lengths = cost_model(config), first.batch.length
        _write("--gantt", args.gantt, lambda path: plot_gantt(first.plan, lengths, cost, path))
    return 0


def _write(option: str, name: str, write: Callable[[Path], object]) -> None:
    try:
        write(Path(name))
    except (OSError, ValueError) as error:  # matplotlib: ValueError for an unknown ending
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{option} {name}: {reason}") from None
    print(f"wrote {name}")
