"""`megascale train`: a run on the ranks of this machine, or one rank that torchrun has started."""

from __future__ import annotations

import argparse
import os
import shlex
from functools import partial
from pathlib import Path

from megascale.launch.local_ranks import RankJob, as_rank, megascale, rank_count, run_ranks
from megascale.runtime.environment import is_driven, world_from_environment
from megascale.runtime.files import real_path
from megascale.runtime.signals import TWIN_S, StopRequest


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
    add_ranks_argument(parser)


def add_ranks_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--ranks`."""
    ranks = "start so many ranks on this machine, on its cores or one for a CUDA device; default: 1"
    parser.add_argument("--ranks", metavar="N", help=ranks)


def add_branch_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale branch`."""
    add = parser.add_argument
    add("parent", metavar="RUN_OR_CHECKPOINT", help="run_dir, or the folder of one checkpoint")
    add_train_arguments(parser)


def run_branch(args: argparse.Namespace) -> int:
    """Train a run that starts from a checkpoint, as `start.checkpoint` in its config would.

    Returns the exit status. Raises UserError for bad input.
    """
    args.overrides = [*args.overrides, f"start.checkpoint={real_path(args.parent)}"]
    return run_train(args)


def run_train(args: argparse.Namespace) -> int:
    """Train; returns the exit status. Raises UserError for bad input.

    With `--ranks` above 1 it starts ranks, once nothing is found wrong with the run.
    """
    count = rank_count(args.ranks)
    return as_rank(partial(_train, args)) if count == 1 else _start_ranks(args, count)


def _start_ranks(args: argparse.Namespace, count: int) -> int:
    asked = StopRequest(echo_s=TWIN_S)
    try:
        from megascale.run.preflight import check_ranks, check_resume, check_run, refuse_used_folder

        check_resume(args.resume)
        config = check_run(args.config, args.overrides)
        check_ranks(config, count)
        run_dir = Path(config.run_dir)
        refuse_used_folder(run_dir, args.resume)
        resume = () if args.resume is None else ("--resume", args.resume)
        job = RankJob(
            command=megascale("train", args.config, *args.overrides, *resume),
            count=count,
            logs=run_dir / "logs",
            advice=f"go on with: {resume_command(args.config, args.overrides, count)}",
            run_dir=run_dir,
        )
        return run_ranks(job, asked)
    finally:
        asked.restore()


def _train(args: argparse.Namespace) -> int:
    world_from_environment()  # what is wrong there is said before anything is read
    from megascale.run.preflight import check_resume
    from megascale.run.resolve import load_run
    from megascale.training.entry import train_on_device

    check_resume(args.resume)
    run = load_run(args.config, args.overrides)
    train_on_device(run, args.resume, resume_command(args.config, args.overrides))
    return 0


def resume_command(config: str, overrides: list[str], started: int = 1) -> str:
    """What a user types to continue this run on as many ranks; `started` by this process, or those
    of which this is one."""
    if is_driven():
        return "megascale launch or submit, as before"
    _, world, _ = world_from_environment()
    world = max(world, started)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    words = ["megascale", "train", config, *overrides, "--resume", "auto"]
    if world != local:
        nodes = ["--nnodes", str(world // local), "--nproc-per-node", str(local)]
        words = ["torchrun", *nodes, "-m", *words]
    elif world > 1:
        words[-2:-2] = ["--ranks", str(world)]
    return shlex.join(words)
