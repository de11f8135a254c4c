"""The run on a terminal: one line for a step, with an honest estimate of the time left."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, TextIO

from megascale.monitor.metric_fields import shown_fields
from megascale.monitor.quantities import show_duration

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
        self._since_line: dict[str, list[float]] = defaultdict(list)

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

    def take(self, row: Mapping[str, Any]) -> None:
        """Take note of the row of a step that gets no line of its own."""
        self.tick(int(row["step"]))
        for field, shown in shown_fields():
            if shown.is_mean and row.get(field.name) is not None:
                self._since_line[field.name].append(row[field.name])

    def line(self, row: Mapping[str, Any]) -> str:
        """One line of a row: percent, step, the fields that `monitor.metric_fields` shows here,
        and the time left. What is not known, or not finite, is left out."""
        self.take(row)
        step, eta = int(row["step"]), self.eta_s()
        row = {**row, **{name: fmean(values) for name, values in self._since_line.items()}}
        self._since_line.clear()
        shown = [field.on_console(row.get(field.name)) for field, _ in shown_fields()]
        parts = [
            f"{100 * step / self.total_steps:5.1f} %",
            f"step {step:{len(str(self.total_steps))}d}/{self.total_steps}",
            *filter(None, shown),
            *([] if eta is None else [f"ETA {show_duration(eta)}"]),
        ]
        return "  ".join(parts)

    def print(self, row: Mapping[str, Any]) -> None:
        """Print `line(row)`."""
        print(self.line(row), file=self._stream or sys.stdout, flush=True)
