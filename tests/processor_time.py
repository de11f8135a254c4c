"""Limits of time that hold on a busy machine: of the processor, not of the clock on the wall."""

from __future__ import annotations

import os
from collections.abc import Callable


def processor_s(action: Callable[[], object], repeats: int = 3) -> float:
    """Processor seconds of `action`, the least of some calls, to 10 ms.

    Of this process and of the processes that it started and waited for in `action`.
    """
    return min(_spent_s(action) for _ in range(repeats))


def _spent_s(action: Callable[[], object]) -> float:
    before = os.times()
    action()
    return sum(os.times()[:4]) - sum(before[:4])
