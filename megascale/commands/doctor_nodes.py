"""`megascale doctor --nodes`: where the ranks come from, and what is said of them."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import partial

from megascale.config.load import whole_number
from megascale.errors import UserError
from megascale.runtime.nodes import Options, run_rank
from megascale.runtime.verdict import LEAST, UNITS, describe, parse_expected

MOST_LOCAL = 64


def add_nodes_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--nodes` and what goes with it."""
    add, default = parser.add_argument, Options()
    add("--nodes", action="store_true", help="test the ranks of this job, and name who is unfit")
    add("--ranks", metavar="N", help="outside of a job: ranks on this machine")
    add(
        "--expect",
        action="append",
        metavar="NAME=VALUE",
        help=f"what is expected, e.g. matmul=600T; default: the median; names: {', '.join(UNITS)}",
    )
    for name, meaning, known in (
        ("seconds", "how long to multiply", default.seconds),
        ("memory-share", "part of a GPU's free memory that is tested", default.memory_share),
        ("timeout-s", "how long to wait for a rank, in seconds", default.timeout_s),
    ):
        add(f"--{name}", type=float, metavar="X", help=f"{meaning}; default: {known:g}")
    least = ", ".join(f"{share:g} on {kind.upper()}" for kind, share in LEAST.items())
    part = "part of what is expected below which a rank or a pair is named"
    add("--least", type=float, metavar="X", help=f"{part}; default: {least}")


WITH_NODES = ("ranks", "expect", "least", "seconds", "memory_share", "timeout_s")


def run_nodes(args: argparse.Namespace) -> int:
    """Test the ranks of this job, or so many on this machine; 1 where one is unfit.

    Raises UserError for bad input.
    """
    told = parse_expected(args.expect or [])
    given = {name: getattr(args, name) for name in ("seconds", "memory_share", "timeout_s")}
    options = Options(**{name: value for name, value in given.items() if value is not None})
    least = args.least
    if not (least is None or 0 < least <= 1) or not (0 < options.memory_share <= 0.9):
        raise UserError("--least is above 0 and at most 1, --memory-share above 0 and at most 0.9")
    if not (0 <= options.seconds <= 86400 and 1 <= options.timeout_s <= 86400):
        raise UserError("--seconds is from 0 to 86400, --timeout-s from 1 to 86400")
    if "RANK" not in os.environ and not _join_slurm():
        return _start_ranks(args)
    if args.ranks is not None:
        raise UserError("--ranks is for one machine outside of a job; here the job says")
    verdict = run_rank(options, told, least)
    if verdict is None:
        return 0
    print(json.dumps(asdict(verdict)) if args.json else describe(verdict), flush=True)
    return 1 if verdict.outliers else 0


def _join_slurm() -> bool:
    """Take rank and rendezvous from a step of Slurm with several tasks; whether this is one."""
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return False
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_node(env["SLURM_STEP_NODELIST"])
    env.setdefault("MASTER_PORT", str(10000 + int(env["SLURM_JOB_ID"]) % 10000))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    return True


def _first_node(nodes: str) -> str:
    """The address by which Slurm reaches the first of some nodes."""
    try:
        ask = partial(subprocess.run, capture_output=True, text=True, check=True)
        first = ask(["scontrol", "show", "hostnames", nodes]).stdout.split()[0]
        node = ask(["scontrol", "show", "node", first]).stdout
        return str(re.findall(r"NodeAddr=(\S+)", node)[0])
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"scontrol does not say where {nodes} are; set MASTER_ADDR and MASTER_PORT to an "
            "address of the first node"
        ) from None


def _start_ranks(args: argparse.Namespace) -> int:
    """Start ranks on this machine; the exit status of rank 0."""
    import torch

    devices = torch.cuda.device_count()
    world = devices or 2
    if args.ranks is not None:
        world = whole_number(args.ranks, "--ranks", 1, devices or MOST_LOCAL)
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // world))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_local_rank, args=(rank, world, port, args), daemon=True)
        for rank in range(world)
    ]
    try:
        for process in ranks:
            process.start()
        ranks[0].join()
        return 0 if ranks[0].exitcode == 0 else 1
    finally:
        for process in ranks:
            process.kill()


def _local_rank(rank: int, world: int, port: int, args: argparse.Namespace) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    args.ranks = None
    sys.exit(run_nodes(args))
