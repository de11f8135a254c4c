"""The run on a terminal: one line for a step, with an honest estimate of the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

MIN_SMOOTHED_STEPS = 100


class Console:
    """Formats steps as lines and estimates the time left.

    The estimate is the steps left times an exponentially weighted mean of seconds per step of
    wall time, evaluation and saves included. The first step of a start is left out, because it
    compiles, allocates and warms caches. The mean remembers about a twentieth of the run, or
    100 steps where that is more, so one slow save does not make it jump.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self._step = start_step
        self._stream = stream
        self._clock = clock
        self._last_s: float | None = None
        self._keep = 1 - 1 / max(MIN_SMOOTHED_STEPS, total_steps / 20)
        self._seconds = self._steps = 0.0

    def tick(self, step: int) -> None:
        """Take note that `step` is done now; a step that is noted already changes nothing."""
        if step <= self._step:
            return
        now = self._clock()
        if self._last_s is not None:
            keep = self._keep ** (step - self._step)
            self._seconds = keep * self._seconds + now - self._last_s
            self._steps = keep * self._steps + step - self._step
        self._last_s, self._step = now, step

    def eta_s(self) -> float | None:
        """Seconds left; None before there are two steps to tell them from."""
        left = self.total_steps - self._step
        if left <= 0:
            return 0.0
        return left * self._seconds / self._steps if self._steps else None

    def line(self, row: Mapping[str, Any]) -> str:
        """One line of a row with step, loss, lr, tokens_per_s, mfu, plan_wait_s (a mean) and
        maybe bits_per_byte."""
        step, bits, mfu = int(row["step"]), row.get("bits_per_byte"), row.get("mfu")
        self.tick(step)
        eta = self.eta_s()
        parts = [
            f"{100 * step / self.total_steps:5.1f} %",
            f"step {step:{len(str(self.total_steps))}d}/{self.total_steps}",
            f"loss {row['loss']:.4f}",
            *([] if bits is None else [f"bits/byte {bits:.3f}"]),
            f"lr {row['lr']:.1e}",
            f"{show_count(row['tokens_per_s'])} tok/s",
            "MFU n/a" if mfu is None else f"MFU {100 * mfu:.1f} %",
            f"plan wait {1000 * row['plan_wait_s']:.1f} ms",
            f"ETA {'n/a' if eta is None else show_duration(eta)}",
        ]
        return "  ".join(parts)

    def print(self, row: Mapping[str, Any]) -> None:
        """Print `line(row)`."""
        print(self.line(row), file=self._stream or sys.stdout, flush=True)


def show_count(count: float) -> str:
    """A count in three or four digits: 987, 41.2K, 3.4M."""
    if count < 999.5:
        return f"{count:.0f}"
    for unit in "KMG":
        count /= 1000
        if count < 999.95:
            return f"{count:.1f}{unit}"
    return f"{count / 1000:.1f}T"


def show_duration(seconds: float) -> str:
    """Whole seconds in the two largest units: 8s, 1m05s, 2h07m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
