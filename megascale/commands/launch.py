"""The driver of one node for `megascale launch`, which keeps a run going in spite of failures."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from megascale.config import Layout, RunConfig, load_config
from megascale.config.load import whole_number
from megascale.errors import UserError, reason
from megascale.launch.board import Board, Ledger, hold_meeting, join_board, serve_board
from megascale.launch.channel import (
    TOKEN_VARIABLE,
    check_token,
    new_token,
    read_token,
    write_token,
)
from megascale.launch.driver import BEAT_S, Driver, Node
from megascale.launch.failures import NOT_KEPT, FailureBook
from megascale.launch.leader import (
    AGAIN,
    BAD_INPUT,
    FINISHED,
    GIVE_UP,
    LEADERLESS,
    Fleet,
    Leader,
    Timing,
)
from megascale.launch.local_ranks import ranks_that_fit
from megascale.launch.slurm import MOST_NODES, node_range, requeue
from megascale.runtime.files import open_lock
from megascale.runtime.lock import HELD_S, JOB_LOCK, hold
from megascale.runtime.logs import say
from megascale.runtime.signals import StopRequest

LEAST_HANG_S = 5.0
STAGGER_S, MOST_STAGGER_S = 0.02, 20.0
"""Between what two nodes ask of Slurm: the first to be heard ends the job for all."""


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


def drive_node(args: argparse.Namespace, check: Callable[[], object]) -> int:
    """Drive this node until the job ends. Node 0 first calls `check`, which raises UserError where
    the run cannot be.

    Returns 0 when the run is done or was asked to stop, or where a node other than the first takes
    no part in a job of Slurm; 1 when a new job may do better, 2 when all ranks met bad input before
    their first step, 3 when the run is given up, 4 when the driver of node 0 is gone. Raises
    UserError for bad input.
    """
    number = _from_slurm(args.node, "--node", "SLURM_NODEID", 0, least=0)
    try:
        return _drive(args, number, check)
    except UserError as error:
        if not (number and "SLURM_JOB_ID" in os.environ):
            raise
        # srun's status is the highest of all nodes, and what becomes of the job is node 0's to say
        print(f"megascale: node {number} takes no part: {error}", file=sys.stderr)
        return FINISHED


def _drive(args: argparse.Namespace, number: int, check: Callable[[], object]) -> int:
    config = load_config(args.config, args.overrides)
    fleet = _fleet(args, config, number)
    timing = _timing(args)
    asked = StopRequest(insisting=(signal.SIGINT,))
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
    given = os.environ.pop(TOKEN_VARIABLE, None)  # what this driver starts has no use for it
    if number == 0:
        check()
        return _lead(node, fleet, timing, asked, port, given)
    token = partial(_find_token, _token_path(config, port), given)
    board = join_board(host, port, token, timing.join_s, timing.lost_s)
    status = Driver(node, board, timing, asked).run()
    job = os.environ.get("SLURM_JOB_ID")
    if status == LEADERLESS and job is not None:
        # with node 0 the batch script may be lost, and a job with --no-kill would go on without it
        time.sleep(min(MOST_STAGGER_S, number * STAGGER_S))
        requeue(job)
    return status


def _lead(
    node: Node, fleet: Fleet, timing: Timing, asked: StopRequest, port: int, token: str | None
) -> int:
    """Drive node 0, and lead the others, on `port` of it; the exit status."""
    with ExitStack() as leave:
        ledger = Ledger()
        meeting, meeting_port = hold_meeting(node.host)
        leave.callback(lambda: meeting)  # it must live as long as the job
        Board(ledger).announce_meeting(meeting_port)
        book = _open_book(fleet.config, os.environ.get("SLURM_JOB_ID"))
        leave.enter_context(_only_job(Path(fleet.config.run_dir)))
        given_up = book.begin(nodes=fleet.num_nodes)
        if given_up is not None:  # before anybody joins, who would miss this driver
            return _give_up(given_up)
        leave.push(partial(_note_error, book))
        if fleet.num_nodes > 1:
            secret = new_token() if token is None else check_token(token)
            leave.callback(serve_board(ledger, node.host, port, secret).close)
            if token is None:
                path = _token_path(fleet.config, port)
                write_token(path, secret)  # a job that held the port would need its own
                leave.callback(path.unlink, missing_ok=True)
        leader = Leader(Board(ledger), book, fleet, timing)
        status = Driver(node, Board(ledger), timing, asked, leader).run()
    if status in (BAD_INPUT, GIVE_UP):
        return status
    why = f"asked by {asked.signal_name}" if asked else _ENDS[status]
    given_up = book.leave(why, time_is_up=asked.signal_name == "SIGUSR1")
    goes_on = status == AGAIN or asked.signal_name == "SIGUSR1"
    if goes_on and given_up is None and not book.is_kept():
        given_up = f"{fleet.config.run_dir} {NOT_KEPT}"
    return status if given_up is None else _give_up(given_up)


def _note_error(
    book: FailureBook, kind: object, error: BaseException | None, trace: object
) -> None:
    """Write into the diary of the run what ends this driver, such as a second Ctrl-C."""
    if error is not None:
        book.leave(reason(error), time_is_up=False)


@contextmanager
def _only_job(run_dir: Path) -> Iterator[None]:
    """Hold the folder of a run, so that no other job drives it. Raises UserError where one does.

    What a lost node held, a file server may free only after minutes, so a job of Slurm waits.
    """
    with ExitStack() as leave:
        with suppress(OSError):  # of a full disk, for which nodes are checked, or without locks
            file = leave.enter_context(open_lock(run_dir / JOB_LOCK))
            holder = hold(file, HELD_S if "SLURM_JOB_ID" in os.environ else 0.0)
            if holder is not None:
                raise UserError(
                    f"run_dir {run_dir} is driven by another job ({holder}); "
                    "stop that one or set another run_dir"
                )
        yield


def _token_path(config: RunConfig, port: int) -> Path:
    """Where drivers find the token of a job that was given none."""
    return Path(config.run_dir) / f".token-{port}"


def _find_token(path: Path, given: str | None) -> str:
    return check_token(given) if given is not None else read_token(path)


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


_ENDS = {FINISHED: "the ranks ended well", AGAIN: "too few nodes are fit"}


def _give_up(why: str) -> int:
    say(f"megascale: the run is given up: {why}")
    return GIVE_UP


def _open_book(config: RunConfig, job: str | None) -> FailureBook:
    try:
        return FailureBook(config.run_dirs, job)
    except OSError as error:
        raise UserError(
            f"run_dir {config.run_dir}: {error.strerror}; choose a folder you own"
        ) from None


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
