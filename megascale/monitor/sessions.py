"""The starts of a run, from its events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from megascale.monitor.events import at
from megascale.monitor.metrics import MOST_STEPS, has_numbers

NUMBERS = {
    "start": ("began", "step", "world"),
    "progress": ("step",),
    "stop": ("step",),
    "error": ("step",),
    "skip": ("step",),
    "rollback": ("step", "to_step"),
    "rewind": ("last_step", "step_s", "written"),
}
"""What of an event is counted with; one that lacks it is left out."""
OF_OTHERS = ("launch", "attempt", "failure", "gave_up", "leave", "slow", "hang", "rewind")
"""Events that are not the word of the run which was started last, but of a driver, or of the next
start. `rewind`: that one found metrics up to `last_step`, the last of them `written` then, and
went back before them."""


@dataclass(frozen=True)
class Session:
    """One start of a run, until it ended or another began. Times are seconds since the epoch."""

    began: float
    started: float
    """When it was ready to train."""
    ended: float
    """Its last word."""
    world: int
    first_step: int
    """Steps that were done when it started."""
    total_steps: int | None
    """Steps at its end, as it expected; None where an earlier version wrote it."""
    last_step: int
    spent: Mapping[str, float]
    """Seconds by SPENT."""
    skipped: frozenset[int]
    """Steps that were skipped."""
    undone: tuple[range, ...]
    """Steps that each of its rollbacks took back, also steps of earlier starts."""
    end: str | None
    """How it ended: 'done', 'stopped', or what failed; None where it left no word."""


def sessions_of(events: Sequence[Mapping[str, Any]]) -> Iterator[Session]:
    """The starts that `events` tell of, oldest first."""
    starts = [index for index, event in enumerate(events) if event["event"] == "start"]
    for begin, end in pairwise([*starts, len(events)]):
        start, rest = events[begin], events[begin + 1 : end]
        rest = [event for event in rest if not is_failed_start(event)]
        progress = [event for event in rest if event["event"] in ("progress", "stop")]
        spoken = [event for event in (start, *rest) if event["event"] not in OF_OTHERS]
        one = Session(
            began=float(start["began"]),
            started=at(start),
            ended=at(spoken[-1]),
            world=int(start["world"]),
            first_step=int(start["step"]),
            total_steps=int(start["total_steps"]) if has_numbers(start, "total_steps") else None,
            last_step=int(progress[-1]["step"]) if progress else int(start["step"]),
            spent=progress[-1]["spent"] if progress else {},
            skipped=frozenset(event["step"] for event in rest if event["event"] == "skip"),
            undone=tuple(
                range(int(event["to_step"]) + 1, int(event["step"]) + 1)
                for event in rest
                if event["event"] == "rollback"
            ),
            end=end_of(rest),
        )
        for event in rest:
            if event["event"] == "rewind":
                last_step, seconds = int(event["last_step"]), float(event["written"])
                one = went_on(one, last_step, seconds, float(event["step_s"]))
        yield one


def is_whole(event: Mapping[str, Any]) -> bool:
    """Whether an event has the numbers that are counted with."""
    kind = event["event"]
    if kind in ("progress", "stop") and not _is_spent(event.get("spent")):
        return False
    names = NUMBERS.get(kind, ())
    return has_numbers(event, *names) and all(0 <= event[name] <= MOST_STEPS for name in names)


def _is_spent(spent: Any) -> bool:
    return isinstance(spent, dict) and has_numbers(spent, *spent)


def is_failed_start(event: Mapping[str, Any]) -> bool:
    """Whether a run without a launcher failed before it had written that it starts."""
    return event["event"] == "error" and bool(event.get("starting"))


def end_of(rest: Sequence[Mapping[str, Any]]) -> str | None:
    """`Session.end`, from the events of a start."""
    for event in rest:
        if event["event"] in ("failure", "error"):
            return str(event.get("error", "failed"))
        if event["event"] == "stop":
            return "stopped" if event.get("asked") else "done"
        if event["event"] == "leave":
            return f"left: {event.get('why')}"
    return None


def went_on(session: Session, last_step: int, ended: float, step_s: float) -> Session:
    """A start that went on after its last account of itself, in steps of so many seconds."""
    more = max(0, last_step - session.last_step)
    spent = {**session.spent, "training": session.spent.get("training", 0.0) + more * step_s}
    ended = max(session.ended, ended)
    return replace(session, ended=ended, last_step=session.last_step + more, spent=spent)
