"""Events of a run as text for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from megascale.monitor.quantities import show_bytes, show_duration

HIDDEN = ("time", "event", "step", "spent", "began", "layout", "total_steps", "tokens_seen")
"""Fields that a table of events shows elsewhere, or that say nothing in it."""
TEXTS: dict[str, tuple[str, ...]] = {
    "start": ("on {world} x {device}: {command}", "ranks {world}: {command}", "ranks {world}"),
    "stop": ("{asked}",),
    "save": (
        "{error}",
        "{emergency} of {bytes}, written in {seconds}",
        "checkpoint of {bytes}, written in {seconds}",
    ),
    "skip": (
        "update left out: loss {loss}, gradient norm {grad_norm}",
        "update left out: loss {loss}",
        "update left out: loss not finite",
    ),
    "spike": ("loss {loss}, above the limit of {limit}",),
    "rollback": (
        "back to step {to_step} after {in_a_row} spikes in a row",
        "back to step {to_step}",
    ),
    "rewind": ("went back; an earlier start had reached step {last_step}",),
    "straggler": ("rank {rank} on {node} takes {slowdown} times as long for the same work",),
    "slow": ("rank {rank} on {node} is slow",),
    "forgetting": ("the held-out loss of {source} is {rise} above its first",),
    "error": ("rank {rank} on {node}: {error}", "{error}"),
    "failure": ("rank {rank} on {node}: {error}", "rank {rank}: {error}", "{error}"),
    "gave_up": ("{why}",),
    "leave": ("{why}",),
    "tracker": ("{tracker}: {problem}",),
    "failed": ("{what}: {problem}",),
    "planner": ("{problem}",),
    "routing": ("{problem}",),
}
"""What is said of a kind of event: the first text all of whose fields the event has."""
YES_OR_NO = {
    "asked": ("stopped by a signal", "reached its end"),
    "emergency": ("emergency copy", "checkpoint"),
}
"""What true and false mean, by field; in others they are yes and no."""
_FIELD = re.compile(r"{(\w+)}")


def event_text(event: Mapping[str, Any]) -> str:
    """What an event says, without its time, name and step; numbers are rounded."""
    for text in TEXTS.get(str(event.get("event")), ()):
        if all(event.get(name) is not None for name in _FIELD.findall(text)):
            return _FIELD.sub(lambda found: show_field(found[1], event[found[1]]), text)
    shown = {name: value for name, value in event.items() if name not in HIDDEN}
    return ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {show_field(name, value)}"
        for name, value in shown.items()
        if value is not None
    )


def show_field(name: str, value: Any) -> str:
    """A value of an event as a person reads it, by the name of its field."""
    if isinstance(value, bool):
        return YES_OR_NO.get(name, ("yes", "no"))[not value]
    if isinstance(value, int | float):
        return _number(name, value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show_field(str(key), inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show_field(name, inner) for inner in value)
    return "n/a" if value is None else str(value)


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if name == "bytes":
        return show_bytes(value)
    if name == "seconds" or name.endswith("_s"):
        return f"{value:.2f} s" if abs(value) < 60 else show_duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
