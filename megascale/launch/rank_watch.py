"""All ranks of an attempt, as the leader sees them: which are slow, and whether any moves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from megascale.launch.board import Board
from megascale.launch.failures import Cause, FailureBook
from megascale.launch.hangs import Hang, RankPulse, SlowWatch, find_hang
from megascale.runtime.logs import say

LOOK_EVERY_S = 1.0
TELL_EVERY_S = 5.0
"""Between two versions of the file that `megascale status` shows."""
STACKS_LIMIT_S = 20.0
"""For all nodes to write the stacks of their ranks."""
POLL_S = 0.1


class RankWatch:
    """Watches the ranks of one attempt on the nodes `members`."""

    def __init__(
        self, board: Board, book: FailureBook, attempt: int, members: Sequence[int],
        name: Callable[[int], str],
    ) -> None:  # fmt: skip
        """`name` gives the names of nodes."""
        self._board, self._book, self._attempt, self._members = board, book, attempt, members
        self._name = name
        self._slow = SlowWatch()
        self._looked_at = self._told_at = -math.inf
        self._nodes: dict[int, str] = {}
        """The node of each rank."""

    def look(self) -> Cause | None:
        """Notice slow ranks; why the attempt has to end, where all ranks hang."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return None
        self._looked_at = now
        ranks = self._ranks()
        if ranks is None:
            return None
        for one in self._slow.see(ranks, now):
            node = self._nodes[one.rank]
            self._book.note("slow", step=one.step, rank=one.rank, node=node)
            say(f"megascale: the others wait for rank {one.rank} on node {node}")
        if now - self._told_at > TELL_EVERY_S:
            self._told_at = now
            self._tell(ranks)
        hang = find_hang(ranks)
        return None if hang is None else self._diagnose(hang)

    def _ranks(self) -> list[RankPulse] | None:
        """The ranks of nodes that have not ended; None while one of these has not told of them."""
        ended = self._board.reports(self._attempt, self._members)
        told = self._board.pulses([node for node in self._members if node not in ended])
        told = {node: one for node, one in told.items() if one["attempt"] == self._attempt}
        if not told or len(told) + len(ended) < len(self._members):
            return None
        ranks = []
        for node, one in sorted(told.items()):
            its = [RankPulse.from_json(rank) for rank in one["ranks"]]
            self._nodes |= {rank.rank: self._name(node) for rank in its}
            ranks += its
        return ranks

    def _tell(self, ranks: Sequence[RankPulse]) -> None:
        rows = [{**asdict(one), "node": self._nodes[one.rank]} for one in ranks]
        self._book.keep_heartbeats(json.dumps({"time": time.time(), "ranks": rows}))

    def _diagnose(self, hang: Hang) -> Cause:
        """Have all nodes write the stacks of their ranks, and note what is known."""
        say(f"megascale: {hang.why}")
        step = max(one.step for one in hang.ranks)
        folder = f"step{step}-attempt{self._attempt}-{time.strftime('%Y%m%dT%H%M%S')}"
        self._board.ask_to_look(self._attempt, folder)
        deadline = time.monotonic() + STACKS_LIMIT_S
        while time.monotonic() < deadline and len(self._looked()) < len(self._members):
            time.sleep(POLL_S)
        self._tell(hang.ranks)
        nodes = sorted({self._nodes[one.rank] for one in hang.named})
        named = [one.rank for one in hang.named]
        facts = {"ranks": named, "nodes": nodes, "why": hang.why, "stacks": f"hangs/{folder}"}
        self._book.note("hang", step=step, **facts)
        cause = Cause(hang.why, time.time())
        return replace(cause, rank=named[0], node=nodes[0]) if len(named) == 1 else cause

    def _looked(self) -> set[int]:
        return self._board.have_looked(self._attempt, self._members)
