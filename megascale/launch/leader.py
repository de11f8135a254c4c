"""The driver of node 0 leads: it calls attempts, sees how they end, and decides what follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import count

from megascale.config import Layout, RunConfig
from megascale.errors import UserError
from megascale.launch.board import Answer, Board, Order
from megascale.launch.failures import FAULT, KILL, MISTAKE, Cause, FailureBook, culprit
from megascale.launch.rank_watch import RankWatch
from megascale.runtime.logs import say

FINISHED, AGAIN, BAD_INPUT, GIVE_UP, LEADERLESS = 0, 1, 2, 3, 4
"""Exit statuses of drivers: done or stopped as asked; failed, but another job may do better; a user
must mend the input; not worth another job; the driver of node 0 is gone, so another is needed."""


@dataclass(frozen=True)
class Timing:
    """How long drivers wait for what, in seconds."""

    join_s: float = 300.0
    """For nodes that have not said whether they are fit."""
    lost_s: float = 20.0
    """For a word of a node, before it counts as lost."""
    backoff_s: float = 2.0
    """Before the second attempt; twice as long before every further one without a save."""
    leave_s: float | None = None
    """For ranks that were asked to save and stop, before they are killed. None: for ever."""
    hang_s: float = 120.0
    """For anything to move on any rank, before they are killed and started again; longer at the
    start, in evaluations and in saves. 0: for ever."""
    reports_s: float = 3.0
    """For the reports of other nodes after the first failure."""
    farewell_s: float = 15.0
    """For the other drivers to leave, before the one that holds the board does."""
    poll_s: float = 0.25
    """Between two looks at the board."""


@dataclass(frozen=True)
class Fleet:
    """The nodes of a job, and how many of them may train."""

    config: RunConfig
    num_nodes: int
    """Drivers of the job."""
    least: int
    most: int
    ranks_per_node: int

    def usable(self, fit: int) -> int:
        """How many of `fit` nodes train: the most that the layout divides into; 0 for none."""
        for nodes in range(min(fit, self.most), self.least - 1, -1):
            try:
                Layout.of(self.config, nodes * self.ranks_per_node)
            except UserError:
                continue
            return nodes
        return 0


class Leader:
    """Leads one job; `run` returns when the job is over."""

    def __init__(self, board: Board, book: FailureBook, fleet: Fleet, timing: Timing) -> None:
        self._board, self._book, self._fleet, self._timing = board, book, fleet, timing
        self._heard: dict[int, tuple[int, float]] = {}
        """The last beat of each node, and when it was new."""
        self._looked_at = time.monotonic()
        self._names: dict[int, str] = {}

    def run(self) -> Order:
        """Call attempts until one ends well or nothing more can be done; how the job ended."""
        for attempt in count():
            order = self._call(attempt)
            self._board.give_order(attempt, order)
            if order.stop is None:
                cause = self._watch(attempt, order.members)
                order = self._decide(cause)
                self._board.end(attempt, order)
            if order.stop is not None:
                self._wait(self._all_left, self._timing.farewell_s)
                return order
            time.sleep(self._book.backoff_s(self._timing.backoff_s))
        raise AssertionError("count() has no end")

    def _call(self, attempt: int) -> Order:
        """Ask the nodes who is fit, and choose."""
        self._wait(lambda: self._all_answered(attempt), self._timing.join_s)
        everyone = range(self._fleet.num_nodes)
        answers = self._board.answers(attempt, sorted(self._present()))
        self._names |= {node: answer.name for node, answer in answers.items()}
        fit = [node for node, answer in answers.items() if answer.problem is None]
        left_out = {self._name(n): _problem(answers.get(n)) for n in everyone if n not in fit}
        members = tuple(fit[: self._fleet.usable(len(fit))])
        for name, problem in left_out.items():
            _say(f"node {name} is left out: {problem}")
        if members:
            world = len(members) * self._fleet.ranks_per_node
            names = [self._name(node) for node in members]
            self._book.attempt(number=attempt, nodes=names, world=world, left_out=left_out)
            return Order(members)
        why = (
            f"{len(fit)} of {len(everyone)} nodes are fit, at least {self._fleet.least} are needed"
        )
        problems = [f"; {name}: {problem}" for name, problem in left_out.items()]
        return self._decide(Cause(why + "".join(problems), time.time()), again=False)

    def _watch(self, attempt: int, members: tuple[int, ...]) -> Cause | None:
        """Wait for the end of an attempt: what broke it, or None where it ended well."""
        ranks = RankWatch(self._board, self._book, attempt, members, self._name)
        while True:
            causes, silent = self._look(attempt, members)
            if causes:
                break
            if not silent:
                return None
            hung = ranks.look()
            if hung is not None:
                return hung
            time.sleep(self._timing.poll_s)
        # those who only lost a peer say so first; whoever is to blame may need longer
        blame = not culprit(causes).lost_a_peer
        limit_s = self._timing.reports_s if blame else self._timing.lost_s + self._timing.reports_s
        self._wait(lambda: not self._look(attempt, members)[1], limit_s)
        causes = self._look(attempt, members)[0]
        cause = culprit(causes)
        if cause.kind == MISTAKE and sum(one.kind == MISTAKE for one in causes) < len(members):
            return replace(cause, kind=FAULT)  # bad input that only some nodes see is theirs
        return cause

    def _look(self, attempt: int, members: tuple[int, ...]) -> tuple[list[Cause], set[int]]:
        """(what broke, the nodes whose ranks still run) in an attempt."""
        reports = self._board.reports(attempt, members)
        running = set(members) - set(reports)
        lost = running - self._present()
        silence = f"the node is lost: no word for {self._timing.lost_s:g} s"
        causes = [Cause(silence, 0.0, node=self._name(one), kind=KILL) for one in sorted(lost)]
        return causes + [cause for cause in reports.values() if cause], running - lost

    def _decide(self, cause: Cause | None, again: bool = True) -> Order:
        """What follows an attempt."""
        if cause is None:
            return Order(stop="the ranks ended well", status=FINISHED)
        is_mistake = cause.kind == MISTAKE and not self._book.has_stepped()
        why = self._book.failed(cause)
        if why is not None:
            _say(f"the run is given up: {why}")
            return Order(stop=why, status=BAD_INPUT if is_mistake else GIVE_UP)
        _say(f"failure: {cause}")
        return Order() if again else Order(stop=cause.error, status=AGAIN)

    def _present(self) -> set[int]:
        """Nodes that gave a sign of life lately; time in which nobody looked does not count."""
        now = time.monotonic()
        away_s = now - self._looked_at
        if away_s > self._timing.lost_s / 2:  # this driver was stopped, or paused between attempts
            self._heard = {node: (n, when + away_s) for node, (n, when) in self._heard.items()}
        self._looked_at = now
        for node, number in self._board.beats(self._fleet.num_nodes).items():
            if node not in self._heard or self._heard[node][0] != number:
                self._heard[node] = (number, now)
        limit = now - self._timing.lost_s
        return {node for node, (_, when) in self._heard.items() if when > limit}

    def _all_answered(self, attempt: int) -> bool:
        """Whether there is nobody to wait for; the first attempt waits for every node."""
        expected: Iterable[int] = self._present() if attempt else range(self._fleet.num_nodes)
        return len(self._board.answers(attempt, expected)) == len(set(expected))

    def _all_left(self) -> bool:
        others = self._present() - {0}
        return others <= self._board.left(others)

    def _name(self, node: int) -> str:
        return self._names.get(node, str(node))

    def _wait(self, done: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not done() and time.monotonic() < deadline:
            time.sleep(self._timing.poll_s)


def _problem(answer: Answer | None) -> str:
    return "no word from it" if answer is None or answer.problem is None else answer.problem


def _say(text: str) -> None:
    say(f"megascale: {text}")
