"""Rows for a tracker, sent by a thread that the training loop never waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from megascale.runtime.process_exit import bound_exit

MOST_WAITING = 10_000
"""Rows that wait for a tracker; of more, the oldest are dropped."""
SLOW_S = 30.0
"""A call to a tracker that takes longer is reported."""
TRIES = 3
"""Of one row."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Pauses after failures in a row."""

Values = Mapping[str, float]


class Tracker(Protocol):
    """A place beside `metrics.jsonl` that takes flat rows of numbers."""

    def log(self, values: Values, step: int) -> None:
        """Take the values of one step."""

    def close(self) -> None:
        """Send what is still buffered."""


class Background:
    """Gives rows to a tracker in a daemon thread, in order.

    `put` never waits. A row that fails is tried TRIES times and then given up. After a failure the
    thread pauses, while rows wait in a queue of bounded length. The first failure, the first
    success after it, and rows that did not arrive become `notices`. The process ends within
    seconds after its main thread, even if a call to the tracker never returns.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[Callable[[str], None]], Tracker],
        room: int = MOST_WAITING,
        slow_s: float = SLOW_S,
        pauses_s: tuple[float, ...] = PAUSES_S,
    ) -> None:
        """`start` makes the tracker, in the thread; its argument takes a notice for the user."""
        self.name = name
        self._start, self._slow_s, self._pauses_s = start, slow_s, pauses_s
        self._rows: deque[tuple[Values, int]] = deque(maxlen=room)
        self._changed = threading.Condition()
        self._closing = False
        self._notices: deque[str] = deque()
        self._given = self._arrived = self._failures = 0
        self._busy_since: float | None = None
        self._warned = self._recovered = False
        bound_exit()
        self._thread = threading.Thread(target=self._serve, name=f"{name}-rows", daemon=True)
        self._thread.start()

    def put(self, values: Values, step: int) -> None:
        """Add a row to the queue; the oldest one goes where the queue is full."""
        with self._changed:
            self._rows.append((values, step))
            self._given += 1
            self._changed.notify()
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._slow_s:
            self._warn(f"has not answered for {self._slow_s:g} s")

    def notices(self) -> list[str]:
        """What the user should know, since the last call."""
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def finish(self) -> None:
        """Let the thread send what waits, close the tracker and end; does not wait for it."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for the end of the thread, at most until `deadline` on the monotonic clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        missing = self._given - self._arrived
        if self._thread.is_alive():
            self._notices.append("did not finish in time and is left behind")
        if missing:
            self._notices.append(
                f"{missing} of {self._given} rows did not arrive; metrics.jsonl has all of them"
            )

    def _serve(self) -> None:
        tracker = self._opened()
        if tracker is None:
            return
        while (row := self._next()) is not None:
            self._deliver(tracker, *row)
        self._attempt(tracker.close)

    def _opened(self) -> Tracker | None:
        """The tracker, as soon as it can be had; None where the run ends before."""
        made: list[Tracker] = []
        while not self._attempt(lambda: made.append(self._start(self._notices.append))):
            if self._closing:
                return None
            self._pause()
        return made[0]

    def _next(self) -> tuple[Values, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._closing)
            return self._rows.popleft() if self._rows else None

    def _deliver(self, tracker: Tracker, values: Values, step: int) -> None:
        """Try a row TRIES times with pauses, at the end once and without."""
        for _ in range(TRIES):
            if self._attempt(lambda: tracker.log(values, step)):
                self._arrived += 1
                return
            if self._closing:
                return
            self._pause()

    def _attempt(self, call: Callable[[], object]) -> bool:
        self._busy_since = time.monotonic()
        try:
            call()
        except BaseException as error:  # also what would end a process; this is the thread's top
            self._failures += 1
            self._warn(" ".join(f"{type(error).__name__}: {error}".split())[:300], error)
            return False
        finally:
            self._busy_since = None
        self._failures = 0
        if self._warned and not self._recovered:
            self._recovered = True
            self._notices.append("answers again")
        return True

    def _pause(self) -> None:
        pause_s = self._pauses_s[min(self._failures, len(self._pauses_s)) - 1]
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=pause_s)

    def _warn(self, problem: str, error: BaseException | None = None) -> None:
        """Report the first failure; the log gets the traceback of it."""
        if self._warned:
            return
        self._warned = True
        logging.getLogger("megascale").warning("%s: %s", self.name, problem, exc_info=error)
        self._notices.append(f"{problem}; the run goes on, its rows are in metrics.jsonl")
