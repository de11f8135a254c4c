"""Asking a run to stop: the first signal ends it after the step, the second at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
INSISTING = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 2.0
"""For the echo of a signal under torchrun, which passes on what the terminal has sent to all."""
TWIN_S = 0.2
"""Elsewhere, for a signal that is sent to a process and to its group, as timeout(1) does."""


class StopRequest:
    """Remembers that this process was asked to stop.

    SIGINT (Ctrl-C), SIGTERM (pre-emption), SIGUSR1 (a time limit) and SIGHUP (a terminal that is
    closed; not under nohup) ask for a checkpoint and a clean end. A second SIGINT or SIGTERM raises
    KeyboardInterrupt at once, unless it is an echo of the first. Made in another thread than the
    main one, it hears no signal: Python delivers none there.
    """

    def __init__(
        self, insisting: Sequence[signal.Signals] = INSISTING, echo_s: float = ECHO_S
    ) -> None:
        """`insisting` are the signals of which a second one ends the process.

        Within `echo_s` of the first it is taken for an echo.
        """
        self._insisting, self._echo_s = insisting, echo_s
        self.at_first: Callable[[], None] = _nothing
        """Called when the first signal comes, between two steps of the main thread."""
        self.signal_name: str | None = None
        """Name of the first signal, or None."""
        self._asked_at = 0.0
        is_main = threading.current_thread() is threading.main_thread()
        is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [one for one in SIGNALS if is_main and not (is_kept and one == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._handle) for number in heard}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._asked_at = signal.Signals(number).name, now
            self.at_first()
        elif number in self._insisting and now - self._asked_at > self._echo_s:
            raise KeyboardInterrupt


def _nothing() -> None:
    """What a first signal does besides being remembered."""
