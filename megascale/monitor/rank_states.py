"""How the ranks of a run were a moment ago, from a file of its launcher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megascale.monitor.metrics import has_numbers
from megascale.monitor.story import QUIET_S
from megascale.parsing import read_json

HEARTBEATS_FILE = "heartbeats.json"
"""How the ranks were a moment ago, as the driver that leads them keeps it."""


def read_heartbeats(run_dir: Path, now: float) -> Mapping[str, Any] | None:
    """How the ranks were a moment before `now`: `told_s` ago, and `ranks`, each as
    `launch.hangs.RankPulse` with the name of its `node`. None where nobody has told lately,
    as without `megascale launch`."""
    try:
        told = read_json(run_dir / HEARTBEATS_FILE)
        told_s, ranks = now - told["time"], [one for one in told["ranks"] if _is_pulse(one)]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return {"told_s": told_s, "ranks": ranks} if abs(told_s) < QUIET_S else None


def _is_pulse(rank: Any) -> bool:
    """Whether it has all that is shown of a rank."""
    return (
        isinstance(rank, dict)
        and has_numbers(rank, "rank", "step", "calls", "quiet_s", "memory_mib", "device_mib")
        and all(isinstance(rank.get(name), str) for name in ("node", "state", "phase", "last"))
        and "waits" in rank
    )
