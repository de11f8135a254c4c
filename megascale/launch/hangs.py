"""Slow, hung or dead: what the pages of the ranks (`runtime/heartbeat.py`) mean.

A rank is quiet while nothing moves on its page. The driver of its node measures for how long, by
its own looks: time in which it did not look itself, because it was stopped or the machine was busy,
does not count. Ranks hang when all of them are quiet for longer than they may be; then those are
named that did not come to the operation on which the others wait. A slow rank keeps all others
waiting, but no rank is quiet for long.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import psutil

from megascale.runtime.files import write_file
from megascale.runtime.heartbeat import (
    CALLS,
    DUMP,
    LAST,
    MARKS,
    MEMORY,
    NAMES,
    PHASE,
    PHASES,
    PID,
    RANK,
    SPENT,
    STACK_SIGNAL,
    STEP,
    STEPS,
    WAITED,
    WAITING_SINCE,
    WAITS,
    flight_file,
    make_pages,
    stack_file,
)

PULSES = {
    "attempt": int,
    "ranks": [
        {
            "rank": int,
            "pid": int,
            "state": str,
            "step": int,
            "phase": str,
            "waits": bool,
            "calls": int,
            "last": str,
            "quiet_s": float,
            "limit_s": float,
            "waited_s": float,
            "memory_mib": int,
            "device_mib": int,
            "spent_s": [float],
        }
    ],
}
"""The form of what a driver says of its ranks."""
AFTER_STEP = (
    "starting",
    "profiling",
    "reporting",
    "restoring",
    "evaluation",
    "saving",
    "planning",
    "micro-batches",
    "gradients",
    "optimizer",
    "ended",
)
"""Phases in the order in which a rank goes through them after a step."""
LONG_PHASES = ("starting", "profiling", "evaluation", "saving", "restoring", "ended")
"""Parts of a run in which quiet may last ..."""
PATIENCE = 5.0
"""... so many times longer; and nowhere shorter than so many times the longest that was seen."""
START_S = 300.0
"""At least, up to the end of the first step."""
MOST_LOOK_S = 2.0
"""Time between two looks that counts, at most."""
SLOW_WINDOW_S = 20.0
BUSY, WAITING = 0.33, 0.5
"""A rank that waits for less than BUSY of the time, while the others (their median) wait for more
than WAITING of it, keeps them waiting."""
STATES = {
    psutil.STATUS_STOPPED: "stopped by a signal",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "waits for a disk or a device",
    psutil.STATUS_ZOMBIE: "dead",
    psutil.STATUS_DEAD: "dead",
}
RUNS = "runs"
MOST_NAMED = 8
"""Ranks in one line."""
STACKS_S, BEFORE_STOPPED_S = 4.0, 3.0
"""For ranks to write their stacks; all before any that was stopped."""
STACKS_POLL_S = 0.05


@dataclass(frozen=True)
class RankPulse:
    """How a rank was when its driver looked."""

    rank: int
    """-1: it has not come so far as to know."""
    pid: int
    state: str
    """`runs`, or one of STATES."""
    step: int
    phase: str
    waits: bool
    """For other ranks."""
    calls: int
    """Collectives that it has begun in this attempt."""
    last: str
    """The last operation over ranks that it began."""
    quiet_s: float
    limit_s: float
    """For how long it may be quiet in this phase; 0: for ever."""
    waited_s: float
    """For others, since it started."""
    memory_mib: int
    device_mib: int
    spent_s: tuple[float, ...]
    """Since it started, by PHASES."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> RankPulse:
        """From one of `PULSES`' ranks."""
        return RankPulse(**{**value, "spent_s": tuple(value["spent_s"])})

    @property
    def is_dead(self) -> bool:
        """Whether its process is gone before its time."""
        return self.state == "dead" and self.phase != "ended"

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come. Calls are no measure: ranks may run different micro-batches."""
        return self.step, AFTER_STEP.index(self.phase)

    @property
    def is_at_work(self) -> bool:
        """Whether others may be waiting for it."""
        return self.phase != "ended" and (self.state != RUNS or not self.waits)

    def __str__(self) -> str:
        doing = f"in {self.phase}" + (f", waiting in {self.last}" if self.waits else "")
        state = "" if self.state == RUNS else f", {self.state}"
        return f"rank {self.rank} {doing} after step {self.step}{state}"


class NodeRanks:
    """A driver's view of its ranks during one attempt."""

    def __init__(self, folder: Path, count: int, hang_s: float) -> None:
        """Makes the pages of `count` ranks in `folder`. `hang_s` 0: they may be quiet for ever."""
        self._folder = folder
        self._ranks = [_Watched(page, hang_s) for page in make_pages(folder, count)]
        self._looked_at = time.monotonic()

    def look(self) -> list[RankPulse]:
        """How the ranks are now."""
        now = time.monotonic()
        elapsed_s = min(now - self._looked_at, MOST_LOOK_S)
        self._looked_at = now
        return [one.look(elapsed_s) for one in self._ranks]

    def write_stacks(self, out: Path) -> None:
        """Have the ranks dump their stacks and torch's flight recorder, and keep both in `out`.

        A rank that was stopped goes on for a moment then, after those of all nodes that were not.
        Raises OSError where `out` cannot be written.
        """
        ranks = self.look()
        stopped = [one.pid for one in ranks if one.state == STATES[psutil.STATUS_STOPPED]]
        for one, watched in zip(ranks, self._ranks, strict=True):
            watched.page[DUMP] = 1
            _send(one.pid, STACK_SIGNAL)
        flights = [flight_file(self._folder, i) for i, one in enumerate(ranks) if one.pid]
        _await(flights, BEFORE_STOPPED_S if stopped else STACKS_S)
        if stopped:
            for pid in stopped:
                _send(pid, signal.SIGCONT)
            _await(flights, STACKS_S)
            for pid in stopped:
                _send(pid, signal.SIGSTOP)
        out.mkdir(parents=True, exist_ok=True)
        for local, one in enumerate(ranks):
            name = f"rank{one.rank}" if one.rank >= 0 else f"{os.uname().nodename}-local{local}"
            stack = _text(stack_file(self._folder, local)) or "(it gave no stack)\n"
            facts = json.dumps(asdict(one))
            write_file(out / f"{name}.txt", f"{one}\n{facts}\n\n{stack}")
            flight = flight_file(self._folder, local)
            if flight.exists():
                shutil.copy(flight, out / f"{name}.flight.json")


class _Watched:
    """The page of one rank, and for how long nothing moved on it."""

    def __init__(self, page: Any, hang_s: float) -> None:
        self.page, self._hang_s = page, hang_s
        self._marks, self._quiet_s, self._phase = 0, 0.0, PHASES[0]
        self._longest_s = dict.fromkeys(PHASES, 0.0)

    def look(self, elapsed_s: float) -> RankPulse:
        page = self.page
        if page[MARKS] == self._marks:
            self._quiet_s += elapsed_s
        else:
            if self._phase != "starting":  # what follows is another thing
                longest = max(self._longest_s[self._phase], self._quiet_s)
                self._longest_s[self._phase] = longest
            self._marks, self._quiet_s, self._phase = page[MARKS], 0.0, PHASES[page[PHASE]]
        waiting_ns = time.monotonic_ns() - page[WAITING_SINCE] if page[WAITS] else 0
        state, memory_bytes = _process(page[PID])
        return RankPulse(
            rank=page[RANK] if page[PID] else -1,
            pid=page[PID],
            state=state,
            step=page[STEP],
            phase=self._phase,
            waits=page[WAITS] > 0,
            calls=page[CALLS],
            last=NAMES[page[LAST]],
            quiet_s=round(self._quiet_s, 3),
            limit_s=round(self._limit_s(), 3),
            waited_s=round((page[WAITED] + waiting_ns) / 1e9, 3),
            memory_mib=memory_bytes >> 20,
            device_mib=page[MEMORY] >> 20,
            spent_s=tuple(round(page[SPENT + i] / 1e9, 3) for i in range(len(PHASES))),
        )

    def _limit_s(self) -> float:
        if not self._hang_s:
            return 0.0
        if not self.page[STEPS]:
            return max(START_S, PATIENCE * self._hang_s)
        longer = PATIENCE if self._phase in LONG_PHASES else 1.0
        return max(longer * self._hang_s, PATIENCE * self._longest_s[self._phase])


def _process(pid: int) -> tuple[str, int]:
    """(the state of a process, its resident bytes)."""
    if not pid:
        return RUNS, 0
    try:
        process = psutil.Process(pid)
        return STATES.get(process.status(), RUNS), process.memory_info().rss
    except psutil.Error:
        return "dead", 0


@dataclass(frozen=True)
class Hang:
    """Ranks that do not go on."""

    named: tuple[RankPulse, ...]
    """Those that did not come to where the others wait; empty where that is nobody."""
    why: str
    ranks: tuple[RankPulse, ...]
    """All of them."""


def find_hang(ranks: Sequence[RankPulse]) -> Hang | None:
    """What is wrong where all ranks of an attempt are quiet for longer than they may be."""
    if not ranks or not all(0 < one.limit_s < one.quiet_s for one in ranks):
        return None
    quiet_s = min(one.quiet_s for one in ranks)
    named = _culprits(ranks)
    waiting = [one for one in ranks if one not in named and one.waits]
    said = "; ".join(map(str, named[:MOST_NAMED])) + (" ..." if len(named) > MOST_NAMED else "")
    if named and waiting:
        first = waiting[0]
        why = f"{said}; {len(waiting)} wait in {first.last}, in {first.phase} after step"
        why += f" {first.step}"
    elif named:
        why = said
    else:
        why = f"all {len(ranks)} ranks stand still: {ranks[0]}; a network, a device or a disk"
    return Hang(named, f"hang: nothing moved for {quiet_s:.0f} s: {why}", tuple(ranks))


def _culprits(ranks: Sequence[RankPulse]) -> tuple[RankPulse, ...]:
    """The dead, else those that wait for nobody, else those that are behind; none if all are."""
    for chosen in (
        [one for one in ranks if one.is_dead],
        [one for one in ranks if one.is_at_work],
        [one for one in ranks if one.place == min(other.place for other in ranks)],
    ):
        if 0 < len(chosen) < len(ranks):
            return tuple(chosen)
    return tuple(ranks) if all(one.is_dead for one in ranks) else ()


class SlowWatch:
    """Notices ranks that keep the others waiting, each once."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[int, float]]] = deque()
        self._named: set[int] = set()

    def see(self, ranks: Sequence[RankPulse], now: float) -> list[RankPulse]:
        """Take how ranks are at `now`, in seconds; those that have just been found to be slow."""
        if any(one.phase in ("starting", "ended") for one in ranks):
            self._seen.clear()
            return []
        self._seen.append((now, {one.rank: one.waited_s for one in ranks}))
        while len(self._seen) > 1 and self._seen[1][0] <= now - SLOW_WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        if now - then < SLOW_WINDOW_S or not 1 < len(ranks) == len(before):
            return []
        share = {one.rank: (one.waited_s - before[one.rank]) / (now - then) for one in ranks}
        usual = median_low(sorted(share.values())[1:])
        slow = [one for one in ranks if share[one.rank] < BUSY and usual > WAITING]
        slow = [one for one in slow if one.rank not in self._named]
        self._named.update(one.rank for one in slow)
        return slow


def _await(files: Sequence[Path], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not all(path.exists() for path in files):
        time.sleep(STACKS_POLL_S)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _send(pid: int, number: signal.Signals) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
