"""`megascale infowindow train-m1`: train the byte model behind the windows, and freeze it."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from megascale.errors import UserError
from megascale.training.byte_model import (
    M1_FILE,
    SHAPES,
    config_of,
    freeze,
    require_freezable,
    write_config,
)


def add_train_m1_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale infowindow train-m1`."""
    add = parser.add_argument
    add(
        "corpus",
        metavar="CORPUS",
        help="corpora of bytes as `megascale prepare` makes them, separated by commas",
    )
    add("overrides", nargs="*", metavar="a.b=c", help="options of the run, e.g. train.tokens=200M")
    add("--out", required=True, metavar="DIR", help=f"folder for the run and {M1_FILE}")
    add("--shape", choices=SHAPES, default="paper", help="paper: 3.2M parameters; small: 0.2M")


def run_train_m1(args: argparse.Namespace) -> int:
    """Cut, train (or go on with it) and freeze; the exit status. Raises UserError.

    A run that a signal stopped is not frozen, and the status is 1: there is no M1 of it yet.
    """
    from megascale.run.resolve import load_run
    from megascale.training.entry import train_on_device

    out = Path(args.out)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "train-m1 is for one process; for more, call it with train.stop_after_steps=1, then "
            f"megascale train {shlex.quote(str(config_of(out)))} --ranks N --resume auto, "
            "then it again"
        )
    corpora = [Path(one) for one in args.corpus.split(",")]
    write_config(corpora, out, args.shape, args.overrides)
    run = load_run(config_of(out), args.overrides)
    require_freezable(run.config)
    if train_on_device(run, "auto", again_command(args)):
        return 1
    model = freeze(out / "run")
    model.save(out / M1_FILE)
    print(f"{out / M1_FILE}: {model.num_parameters:,} parameters, {model.digest[:12]}")
    return 0


def again_command(args: argparse.Namespace) -> str:
    """What a user types to go on, up to the frozen model."""
    words = [args.corpus, *args.overrides, "--out", args.out, "--shape", args.shape]
    return shlex.join(["megascale", "infowindow", "train-m1", *words])
