"""The launcher of one node: from its start until the job ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from megascale.config import RunConfig
from megascale.errors import UserError, reason
from megascale.launch.board import Board, Ledger, hold_meeting, join_board, serve_board
from megascale.launch.channel import (
    TOKEN_VARIABLE,
    check_token,
    new_token,
    read_token,
    write_token,
)
from megascale.launch.driver import Driver, Node
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
from megascale.launch.slurm import requeue
from megascale.runtime.files import open_lock
from megascale.runtime.lock import HELD_S, JOB_LOCK, hold
from megascale.runtime.logs import say
from megascale.runtime.signals import StopRequest

STAGGER_S, MOST_STAGGER_S = 0.02, 20.0
"""Between what two nodes ask of Slurm: the first to be heard ends the job for all."""


def drive_node(
    node: Node, fleet: Fleet, timing: Timing, port: int, check: Callable[[], object]
) -> int:
    """Drive `node` until the job ends. Node 0, which listens on `port`, first calls `check`, which
    raises UserError where the run cannot be.

    Returns 0 when the run is done or was asked to stop; 1 when a new job may do better, 2 when all
    ranks met bad input before their first step, 3 when the run is given up, 4 when the driver of
    node 0 is gone.
    """
    asked = StopRequest(insisting=(signal.SIGINT,))
    given = os.environ.pop(TOKEN_VARIABLE, None)  # what this driver starts has no use for it
    if node.number == 0:
        check()
        return _lead(node, fleet, timing, asked, port, given)
    token = partial(_find_token, _token_path(fleet.config, port), given)
    board = join_board(node.host, port, token, timing.join_s, timing.lost_s)
    status = Driver(node, board, timing, asked).run()
    job = os.environ.get("SLURM_JOB_ID")
    if status == LEADERLESS and job is not None:
        # with node 0 the batch script may be lost, and a job with --no-kill would go on without it
        time.sleep(min(MOST_STAGGER_S, node.number * STAGGER_S))
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
