"""The driver of one node: it starts torchrun for every attempt, and ends what is left of the last.

It outlives its ranks and their agent. Only membership, failures and signs of life pass between
drivers; what the ranks do is a matter of the run, which goes on from its latest checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from signal import SIGUSR1
from typing import TypeVar

from megascale.launch.board import Answer, Board, BoardLost, Order
from megascale.launch.failures import Cause, killed_by
from megascale.launch.hangs import NodeRanks
from megascale.launch.leader import FINISHED, LEADERLESS, Leader, Timing
from megascale.launch.node_check import check_node
from megascale.parsing import read_json
from megascale.runtime.environment import ATTEMPT
from megascale.runtime.heartbeat import FOLDER_VARIABLE
from megascale.runtime.logs import say
from megascale.runtime.processes import adopt_orphans, end_descendants, signal_ranks
from megascale.runtime.scratch import scratch_folder
from megascale.runtime.signals import StopRequest

T = TypeVar("T")
REPEAT_SIGNAL_S = 1.0
"""Ranks that are still starting do not hear the first one."""
BEAT_S = 1.0
"""Between two signs of life."""
FLIGHT_RECORDS = "1000"
"""Operations over ranks that torch's flight recorder keeps."""
SHARED_MEMORY = "/dev/shm"
"""Begins the id of what a driver starts, by torchrun's name for it."""
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Node:
    """One node of a job, and what it runs."""

    number: int
    """From 0; the driver of node 0 leads."""
    name: str
    host: str
    """Address of node 0."""
    ranks: int
    """That it starts."""
    heartbeats: bool
    """Whether its ranks tell how they are."""
    run_dir: str
    check: str | None
    """A shell command that fails where the node is not fit."""
    training: tuple[str, ...]
    """What follows `python -m megascale` on every rank."""

    def torchrun(self, attempt: int, num_nodes: int, port: int) -> list[str]:
        """The command line of torchrun for an attempt on `num_nodes` nodes, whose agents meet on
        `port` of node 0."""
        options = {
            "nnodes": num_nodes,
            "nproc-per-node": self.ranks,
            "max-restarts": 0,  # the drivers restart, all at once and with a pause
            "rdzv-backend": "c10d",
            "rdzv-endpoint": f"{self.host}:{port}",
            "rdzv-id": f"{ATTEMPT}{attempt}",
            "rdzv-conf": "is_host=false",
        }
        if self.host in LOOPBACK:
            options["local-addr"] = self.host
        words = [f"--{name}={value}" for name, value in options.items()]
        return [*words, "-m", "megascale", *self.training]


class Driver:
    """Keeps the ranks of one node going until the job ends; `run` does it."""

    def __init__(
        self,
        node: Node,
        board: Board,
        timing: Timing,
        asked: StopRequest,
        leader: Leader | None = None,
    ) -> None:
        """`asked` is set by signals; `leader` is given on node 0 alone."""
        self._node, self._board, self._timing, self._asked = node, board, timing, asked
        self._leader = leader
        self._leader_error: BaseException | None = None
        self._last_beat = 0.0
        self._stacks_of: int | None = None
        """The attempt whose stacks were written last."""

    def run(self) -> int:
        """Take part in attempts until there are no more; returns the exit status."""
        adopt_orphans()
        leading = threading.Thread(target=self._lead, daemon=True)
        if self._leader is not None:
            leading.start()
        try:
            end = self._follow()
            self._board.leave(self._node.number)
            if self._leader is not None and end is not None:
                leading.join()  # the others still need the board
            return FINISHED if end is None else end.status
        except BoardLost:
            if self._asked:
                return FINISHED
            self._say("the driver of node 0 is gone")
            return LEADERLESS
        finally:
            end_descendants()

    def _lead(self) -> None:
        assert self._leader is not None
        try:
            self._leader.run()
        except BaseException as error:
            self._leader_error = error

    def _follow(self) -> Order | None:
        """Do as the leader says; its last order, or None where this driver was asked to leave."""
        for attempt in count():
            if self._board.over(attempt) is None:
                self._answer(attempt)
                order = self._wait(partial(self._board.order, attempt))
                if order is None or order.stop is not None:
                    return order
                if self._node.number in order.members:
                    self._train(attempt, len(order.members))
                else:
                    self._say("stands by")
            over = self._wait(partial(self._board.over, attempt), self._timing.farewell_s)
            if over is None or over.stop is not None:
                return over
        raise AssertionError("count() has no end")

    def _answer(self, attempt: int) -> None:
        node = self._node
        ranks = node.ranks if attempt else 0
        problem = check_node(node.run_dir, node.check, self._beat, node.name, ranks)
        self._board.answer(attempt, node.number, Answer(node.name, problem))

    def _train(self, attempt: int, num_nodes: int) -> None:
        """Run torchrun until it ends or the attempt is over, and report in the former case."""
        with ExitStack() as leave:
            folder = leave.enter_context(scratch_folder(tempfile.gettempdir()))
            verdict = folder / "cause.json"
            words = ["-m", "megascale.launch.agent", str(verdict), f"--log-dir={folder}"]
            words += self._node.torchrun(attempt, num_nodes, self._board.meeting())
            ranks, environment = None, dict(os.environ)
            if self._node.heartbeats:
                pages = leave.enter_context(scratch_folder(_memory()))
                ranks = NodeRanks(pages, self._node.ranks, self._timing.hang_s)
                environment |= {FOLDER_VARIABLE: str(pages)}
                environment.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDS)
            command = [sys.executable, *words]
            agent = subprocess.Popen(command, start_new_session=True, env=environment)
            try:
                ended = self._attend(agent, attempt, ranks)
            finally:
                end_descendants()
            if ended is not None:
                cause = _cause(ended, verdict)
                named = cause and replace(cause, node=self._node.name)
                self._board.report(attempt, self._node.number, named)

    def _attend(
        self, agent: subprocess.Popen[bytes], attempt: int, ranks: NodeRanks | None
    ) -> int | None:
        """The status with which torchrun ended; None where it was not waited for."""
        limit_s = float("inf") if self._timing.leave_s is None else self._timing.leave_s
        asked_at = told_at = 0.0
        while (status := agent.poll()) is None:
            if self._beat() and ranks is not None:
                self._tell(attempt, ranks)
            if self._board.over(attempt) is not None:
                return None
            now = time.monotonic()
            if self._asked and now - told_at > REPEAT_SIGNAL_S:
                if not told_at:
                    self._say(f"{self._asked.signal_name}: the ranks are to save and stop")
                asked_at, told_at = asked_at or now, now
                signal_ranks(agent.pid, SIGUSR1)
            if asked_at and now - asked_at > limit_s:
                self._say(f"the ranks did not stop within {limit_s:g} s")
                return None
            time.sleep(self._timing.poll_s)
        return status

    def _tell(self, attempt: int, ranks: NodeRanks) -> None:
        """Say how the ranks are, and write their stacks where the leader asks for that."""
        node = self._node
        told = [asdict(one) for one in ranks.look()]
        self._board.pulse(node.number, {"attempt": attempt, "ranks": told})
        folder = self._board.look(attempt)
        if folder is None or self._stacks_of == attempt:
            return
        self._stacks_of = attempt
        try:
            ranks.write_stacks(Path(node.run_dir) / "hangs" / Path(folder).name)
        except OSError as error:
            self._say(f"the stacks of its ranks could not be written: {error}")
        self._board.looked(attempt, node.number)

    def _wait(self, look: Callable[[], T | None], patience_s: float = 0.0) -> T | None:
        """What `look` sees at last; None when this driver was asked to leave and has waited."""
        waited_s = 0.0
        while (seen := look()) is None:
            self._beat()
            if self._asked and waited_s >= patience_s:
                return None
            time.sleep(self._timing.poll_s)
            waited_s += self._timing.poll_s if self._asked else 0.0
        return seen

    def _beat(self) -> bool:
        """Give a sign of life where one is due; whether one was."""
        if self._leader_error is not None:
            raise self._leader_error
        if time.monotonic() - self._last_beat <= BEAT_S:
            return False
        self._last_beat = time.monotonic()
        self._board.beat(self._node.number)
        return True

    def _say(self, text: str) -> None:
        say(f"megascale: node {self._node.name}: {text}")


def _memory() -> str:
    """A folder in memory, where there is one: no rank should wait for a disk to tell how it is."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else tempfile.gettempdir()


def _cause(status: int, verdict: Path) -> Cause | None:
    """Why torchrun ended with `status`; None where all was well."""
    if status == 0:
        return None
    try:
        return Cause.from_json(read_json(verdict))
    except (OSError, ValueError, TypeError):
        pass
    if status < 0:
        how, kind = killed_by(-status)
        return Cause(f"torchrun was {how}", time.time(), kind=kind)
    return Cause(f"torchrun ended with status {status}", time.time())
