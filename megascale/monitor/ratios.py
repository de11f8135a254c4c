"""Ratios of times that were measured in turn, and whether the machine was quiet enough for them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

LEAST_FREE = 0.8
"""Part of the cores that the ranks can use that other programs must have left to them."""
MOST_SPREAD = 1.5
"""Largest ratio of a repeat over the smallest, above which the repeats do not agree."""
BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""What psutil counts as work of a machine's processors. `guest` is in `user`."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long something takes: of all repeats, each a ratio of its own."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(slow_s: Sequence[float], fast_s: Sequence[float]) -> Ratio:
        """Of the seconds of each repeat, both measured right after one another."""
        ratios = [slow / fast for slow, fast in zip(slow_s, fast_s, strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}x (from {self.least:.2f}x to {self.most:.2f}x)"

    @property
    def spread(self) -> float:
        """The largest over the smallest."""
        return self.most / self.least


@dataclass(frozen=True)
class MachineUse:
    """What else a machine did while ranks were timed."""

    wall_s: float
    """Seconds that were timed."""
    others_s: float
    """Processor seconds of other programs in that time, in which the machine had to wait too."""
    cores: int
    """Cores of the machine."""
    usable_cores: int
    """Cores that the ranks can use at the same time."""

    @property
    def others_cores(self) -> float:
        """Cores that other programs kept busy."""
        return self.others_s / self.wall_s if self.wall_s else 0.0


def machine_busy_s() -> float:
    """Processor seconds of all programs of this machine since it was started."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in BUSY)


def why_no_ratio(ratios: Sequence[Ratio], use: MachineUse) -> str | None:
    """Why measured ratios would be noise, in words; None where they say something."""
    free = use.cores - use.others_cores
    if free < LEAST_FREE * use.usable_cores:
        return (
            f"other programs kept {use.others_cores:.1f} of {use.cores} cores busy while steps "
            f"were timed, and the ranks need {LEAST_FREE * use.usable_cores:.1f}"
        )
    widest = max(ratios, key=lambda ratio: ratio.spread)
    if widest.spread > MOST_SPREAD:
        return (
            f"the repeats do not agree: {widest.least:.2f}x to {widest.most:.2f}x, more than a "
            f"factor of {MOST_SPREAD:g} apart"
        )
    return None
