"""Asking a run to stop: the first signal ends it after the step, the second at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
INSISTING = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 2.0


class StopRequest:
    """Remembers that this process was asked to stop.

    SIGINT (Ctrl-C), SIGTERM (pre-emption), SIGUSR1 (a time limit) and SIGHUP (a terminal that is
    closed; not under nohup) ask for a checkpoint and a clean end. A second SIGINT or SIGTERM raises
    KeyboardInterrupt at once; one that follows within 2 s is taken for an echo of the first,
    because torchrun passes on to its workers the Ctrl-C that the terminal has already sent them.
    """

    def __init__(self, insisting: Sequence[signal.Signals] = INSISTING) -> None:
        """`insisting` are the signals of which a second one ends the process."""
        self._insisting = insisting
        self.signal_name: str | None = None
        """Name of the first signal, or None."""
        self._asked_at = 0.0
        is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in SIGNALS if not (is_kept and number == signal.SIGHUP)]
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
        elif number in self._insisting and now - self._asked_at > ECHO_S:
            raise KeyboardInterrupt
