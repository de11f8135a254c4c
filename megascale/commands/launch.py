"""`megascale launch`: a run is looked at once, then launchers keep its ranks going, one a node."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import asdict
from functools import partial

from megascale.config import Layout, RunConfig, load_config
from megascale.config.load import whole_number
from megascale.errors import UserError
from megascale.installation import require_training
from megascale.launch.driver import BEAT_S, Node
from megascale.launch.job import drive_node
from megascale.launch.leader import FINISHED, Fleet, Timing
from megascale.launch.local_ranks import ranks_that_fit
from megascale.launch.slurm import MOST_NODES, node_range
from megascale.run.preflight import check_run

LEAST_HANG_S = 5.0


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale launch`."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file of the run")
    add("overrides", nargs="*", metavar="a.b=c", help="options that replace those of the file")
    add(
        "--nodes",
        metavar="N|MIN-MAX",
        help="how many nodes train; more stand by. Default: all, and on while one is left",
    )
    ranks = "ranks on every node; default: one per CUDA device, 1 without"
    add("--ranks-per-node", metavar="N", help=ranks)
    add(
        "--rendezvous",
        metavar="HOST:PORT",
        default="127.0.0.1:0",
        help="where the driver of node 0 listens; default: a free port of this machine",
    )
    add("--node", metavar="I", help="number of this node, from 0; default: Slurm's, else 0")
    add("--num-nodes", metavar="N", help="drivers of the job; default: Slurm's, else 1")
    add(
        "--check",
        metavar="COMMAND",
        help="a shell command that fails where a node is not fit; run before every attempt",
    )
    default = Timing()
    for name, meaning in _TIMES.items():
        known = getattr(default, f"{name}_s")
        shown = "for ever" if known is None else f"{known:g}"
        help_ = f"seconds to wait {meaning}; default: {shown}"
        add(f"--{name}-s", type=float, metavar="S", default=known, help=help_)


_TIMES = {
    "join": "for nodes that have not said whether they are fit",
    "lost": "for a word of a node before it counts as lost",
    "backoff": "before the second attempt; doubled for each further one without a save",
    "hang": "while nothing moves on any rank, before all are killed and started again; longer at "
    "the start, in evaluations and in saves; 0: for ever",
    "leave": "for ranks that were asked to save and stop, before they are killed",
}


def run_launch(args: argparse.Namespace) -> int:
    """Drive this node until the job ends; returns the exit status of `drive_node`, or 0 where a
    node other than the first takes no part in a job of Slurm.

    Raises UserError for bad input, before anything is started.
    """
    number = _from_slurm(args.node, "--node", "SLURM_NODEID", 0, least=0)
    try:
        return _drive(args, number)
    except UserError as error:
        if not (number and "SLURM_JOB_ID" in os.environ):
            raise
        # srun's status is the highest of all nodes, and what becomes of the job is node 0's to say
        print(f"megascale: node {number} takes no part: {error}", file=sys.stderr)
        return FINISHED


def _drive(args: argparse.Namespace, number: int) -> int:
    config = load_config(args.config, args.overrides)
    require_training()
    fleet = _fleet(args, config, number)
    timing = _timing(args)
    host, port = _endpoint(args.rendezvous, fleet.num_nodes)
    node = Node(
        number=number,
        name=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        host=host,
        ranks=fleet.ranks_per_node,
        heartbeats=config.monitor.heartbeats,
        run_dir=config.run_dir,
        check=args.check,
        training=("train", args.config, *args.overrides, "--resume", "auto"),
    )
    return drive_node(node, fleet, timing, port, partial(check_run, args.config, args.overrides))


def _fleet(args: argparse.Namespace, config: RunConfig, number: int) -> Fleet:
    num_nodes = _from_slurm(args.num_nodes, "--num-nodes", "SLURM_STEP_NUM_NODES", 1, least=1)
    if number >= num_nodes:
        raise UserError(f"--node {number}: nodes are numbered from 0 to {num_nodes - 1}")
    least, most = (1, num_nodes) if args.nodes is None else node_range(args.nodes)
    fleet = Fleet(config, num_nodes, least, most, _ranks_per_node(args.ranks_per_node))
    if not fleet.usable(num_nodes):
        Layout.of(config, min(num_nodes, most) * fleet.ranks_per_node)  # says what does not fit
        raise UserError(f"--nodes {args.nodes}: the job has {num_nodes}")
    return fleet


def _timing(args: argparse.Namespace) -> Timing:
    timing = Timing(**{f"{name}_s": getattr(args, f"{name}_s") for name in _TIMES})
    if not all(value is None or value >= 0 for value in asdict(timing).values()):
        raise UserError("times are 0 seconds or more")
    if timing.lost_s < 3 * BEAT_S:
        raise UserError(
            f"--lost-s {timing.lost_s:g}: nodes speak every {BEAT_S:g} s; give 3 or more"
        )
    if 0 < timing.hang_s < LEAST_HANG_S:
        raise UserError(f"--hang-s {timing.hang_s:g}: give {LEAST_HANG_S:g} or more, or 0 for ever")
    return timing


def _from_slurm(given: str | None, option: str, variable: str, default: int, least: int) -> int:
    """A number from the command line, from Slurm, or the default."""
    text, where = (given, option) if given is not None else (os.environ.get(variable), variable)
    return default if text is None else whole_number(text, where, least, MOST_NODES)


def _endpoint(text: str, num_nodes: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise UserError(f"--rendezvous {text}: write it as HOST:PORT, e.g. node1:29500")
    if num_nodes > 1 and not int(port):
        raise UserError("--rendezvous is missing; give an address of node 0, e.g. node1:29500")
    return host, int(port)


def _ranks_per_node(given: str | None) -> int:
    if given is not None:
        return ranks_that_fit(given, "--ranks-per-node")
    import torch

    return max(1, torch.cuda.device_count())
