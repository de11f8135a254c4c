"""`megascale train`: one rank of a run; torchrun starts many."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.errors import UserError
from megascale.resilience.driver import is_driven
from megascale.resilience.processes import die_with_parent
from megascale.runtime.environment import world_from_environment

if TYPE_CHECKING:
    from megascale.config import RunConfig
    from megascale.corpus.describe import SourceInfo


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale train`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="options that replace those of the file"
    )
    parser.add_argument(
        "--resume",
        metavar="{auto,latest,STEP}",
        help="continue the run in run_dir: from its latest good checkpoint (latest), from that or "
        "from the start where there is none (auto), or from the checkpoint of a step",
    )


def add_branch_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale branch`."""
    add = parser.add_argument
    add("parent", metavar="RUN_OR_CHECKPOINT", help="run_dir, or the folder of one checkpoint")
    add_train_arguments(parser)


def run_branch(args: argparse.Namespace) -> int:
    """Train a run that starts from a checkpoint, as `start.checkpoint` in its config would.

    Returns the exit status. Raises UserError for bad input.
    """
    args.overrides = [*args.overrides, f"start.checkpoint={Path(args.parent).resolve()}"]
    return run_train(args)


def run_train(args: argparse.Namespace) -> int:
    """Train; returns the exit status. Raises UserError for bad input.

    Under torchrun it ends when its agent is gone, and leaves the agent the cause of a failure.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return _train(args)
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import record

    status = record(_train)(args)
    assert status is not None
    return status


def _train(args: argparse.Namespace) -> int:
    resume = args.resume
    if resume not in (None, "auto", "latest") and not resume.isdigit():
        raise UserError(f"--resume {resume}: give auto, latest or the number of a step")
    world_from_environment()  # what is wrong there is said before anything is read
    from megascale.train.describe import load_run

    config, sources = load_run(args.config, args.overrides)
    train_on_device(config, sources, resume, resume_command(args.config, args.overrides))
    return 0


def train_on_device(
    config: RunConfig, sources: Mapping[str, SourceInfo], resume: str | None, command: str
) -> bool:
    """Make the device ready and train as `loop.train` does; whether a signal stopped it."""
    from megascale.train.describe import cost_model

    cost_model(config)  # a bad cost file is found before there is a run folder
    from megascale.runtime import distributed

    distributed.prepare_device(config.device)
    from megascale.train.loop import train

    return train(config, sources, resume, command)


def resume_command(config: str, overrides: list[str]) -> str:
    """What a user types to continue this run on as many ranks."""
    if is_driven():
        return "megascale launch or submit, as before"
    _, world, _ = world_from_environment()
    words = [config, *overrides, "--resume", "auto"]
    launcher = ["megascale", "train"]
    if world > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", str(world))
        launcher = ["torchrun", "--nproc-per-node", local, "-m", "megascale", "train"]
        if int(local) != world:
            launcher[1:1] = ["--nnodes", str(world // int(local))]
    return shlex.join([*launcher, *words])
