"""Where a run is and where its time went, told from the files of its folder. No torch."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megascale.config import RunConfig, load_config
from megascale.errors import UserError
from megascale.monitor.events import at, read_events
from megascale.monitor.metrics import METRICS_FILE, has_numbers, read_rows
from megascale.monitor.quantities import show_duration
from megascale.monitor.sessions import (
    Session,
    end_of,
    is_failed_start,
    is_whole,
    sessions_of,
    went_on,
)
from megascale.monitor.time_spent import SPENT
from megascale.runtime.lock import JOB_LOCK, RUN_LOCK, Holding, ask

PARTS = {
    "training": "steps that count",
    "skipped": "steps whose update was left out",
    "undone": "steps that a rollback took back",
    "repeated": "steps that a later start trained again",
    "starting": "from the start of the process to the first step",
    "planning": "waiting for a plan",
    "evaluation": "held-out loss",
    "saving": "training stood still for a checkpoint",
    "down": "between two starts",
    "other": "not accounted for",
}
"""What the wall time of a run is made of."""
TURNS = ("launch", "attempt", "start", "stop", "error", "failure", "gave_up", "leave")
"""Events after which a run is in another state than before."""
OF_LAUNCHER = ("launch", "attempt", "failure")
"""TURNS after which a launcher is about to start ranks."""
SILENT = "silent: dead or hung"
GOES_ON = ("done", "training", "starting", "silent for", "ended; the launcher", "has not started")
"""How states begin of a run that nobody needs to continue, or whose process still lives."""
UNKNOWN_COMMAND = "the command that started it, with --resume auto"
QUIET_S, QUIET_STEPS = 120.0, 10
"""A run that says nothing for so long, and for so many of its steps, is thought dead or hung."""


@dataclass(frozen=True)
class Story:
    """All starts of a run."""

    config: RunConfig | None
    """None before the run has written it, which it does when its ranks have met."""
    sessions: tuple[Session, ...]
    last: Mapping[str, Any]
    """The last step's row of metrics; empty before there is one."""
    events: Sequence[Mapping[str, Any]]
    run: Holding = Holding()
    """Whether ranks are in the folder."""
    job: Holding = Holding()
    """Whether a launcher is."""

    @property
    def total_steps(self) -> int | None:
        """Steps at the end of the run; None where it has no config yet.

        As its last start expected them: a run takes steps until it has seen its tokens.
        """
        if self.config is None:
            return None
        train = self.config.train
        if self.tokens_seen >= train.tokens or self.step >= (train.stop_after_steps or math.inf):
            return self.step
        expected = self.sessions[-1].total_steps if self.sessions else None
        batches = -(-train.tokens // self.config.data.global_batch_tokens)
        return max(self.step + 1, expected or batches)

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.last.get("step", 0))

    @property
    def tokens_seen(self) -> int:
        """Loss tokens of those steps."""
        return int(self.last.get("tokens_seen", 0))

    @property
    def wall_s(self) -> float:
        """From the start of the first process to the last word."""
        return self.sessions[-1].ended - self.sessions[0].began if self.sessions else 0.0

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of `wall_s` by PARTS, which they add up to.

        Of a start some of whose steps do not count, every step is taken to last equally long.
        """
        parts = dict.fromkeys(PARTS, 0.0)
        for index, one in enumerate(self.sessions):
            following = self.sessions[index + 1] if index + 1 < len(self.sessions) else None
            steps = max(1, one.last_step - one.first_step)
            step_s = one.spent.get("training", 0.0) / steps
            if following is not None:
                parts["down"] += max(0.0, following.began - one.ended)
            lost = {name: step_s * number for name, number in self._lost(index).items()}
            for name, seconds in lost.items():
                parts[name] += seconds
            parts["training"] += one.spent.get("training", 0.0) - sum(lost.values())
            parts["starting"] += one.started - one.began
            for name in SPENT[1:]:
                parts[name] += one.spent.get(name, 0.0)
        parts["other"] = max(0.0, self.wall_s - sum(parts.values()))
        return parts

    def _lost(self, index: int) -> dict[str, int]:
        """How many steps of a start do not count, by PARTS; each is in one of them."""
        one = self.sessions[index]
        kept = self._kept(index)
        done = range(one.first_step + 1, min(one.last_step, kept) + 1)
        undone = [
            steps
            for later in range(index, len(self.sessions))
            for steps in self.sessions[later].undone
            # a rollback may itself have been gone back on
            if steps.stop - 1 <= self._kept(later)
        ]
        skipped = sum(
            step in done and not any(step in steps for steps in undone) for step in one.skipped
        )
        repeated = one.last_step - max(one.first_step, min(one.last_step, kept))
        return {"skipped": skipped, "undone": _overlap(undone, done), "repeated": repeated}

    def _kept(self, index: int) -> int:
        """The step up to which no later start trained the steps of a start again."""
        return min((one.first_step for one in self.sessions[index + 1 :]), default=sys.maxsize)

    @property
    def goodput(self) -> float:
        """Time in steps that count, over wall time."""
        return self.parts["training"] / self.wall_s if self.wall_s else 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Wall time per step of the last start; None where it has none yet."""
        if not self.sessions:
            return None
        one = self.sessions[-1]
        steps = one.last_step - one.first_step
        return (one.ended - one.started) / steps if steps > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at that pace; None where it is not known."""
        pace, total_steps = self.seconds_per_step, self.total_steps
        if pace is None or total_steps is None:
            return None
        return pace * max(0, total_steps - self.step)

    def state(self, now: float) -> str:
        """What the run seems to be doing at `now`, seconds since the epoch."""
        turns = [event for event in self.events if event["event"] in TURNS]
        if not turns:
            return "starting" if self.run.held else "has not started"
        if turns[-1]["event"] in OF_LAUNCHER:
            return self._between(turns, now)
        if self.run.held and self.run.since > at(turns[-1]):
            return "starting"
        if turns[-1]["event"] == "start":
            return self._pace(now)
        return _over(turns)

    def _between(self, turns: Sequence[Mapping[str, Any]], now: float) -> str:
        """What a launcher seems to be doing that has no ranks which train."""
        ends = (one for one in reversed(turns) if one["event"] not in ("launch", "attempt"))
        end = next(ends, turns[-1])
        after = f" after: {end_of((end,))}" if end["event"] == "failure" else ""
        if not self.run.held and not self.job.held:
            if self.job.held is False:
                return f"killed with its launcher{after}"
            if now - at(turns[-1]) > QUIET_S:
                return SILENT
        return f"starting again{after}" if after else "starting"

    def _pace(self, now: float) -> str:
        """What a run seems to be doing that has started and has not said that it ended."""
        one = self.sessions[-1]
        if self.run.held is False:
            if self.job.held:
                return "ended; the launcher decides what follows"
            return f"killed at step {self.step:,}: its process ended without a word"
        quiet_s = now - one.ended
        if quiet_s > max(QUIET_S, QUIET_STEPS * (self.seconds_per_step or 0.0)):
            known = f"silent for {show_duration(quiet_s)}: alive, perhaps hung"
            return known if self.run.held else SILENT
        return "training" if one.last_step > one.first_step else "starting"

    def resume_command(self, now: float) -> str | None:
        """How a user continues a run that does not go on by itself; None where there is no need."""
        starts = [event for event in self.events if event["event"] == "start"]
        if not starts or self.state(now).startswith(GOES_ON):
            return None
        return str(starts[-1].get("command", UNKNOWN_COMMAND))

    @property
    def failed_starts(self) -> Iterator[Mapping[str, Any]]:
        """The failures before which ranks had not begun to train, oldest first."""
        trains = False
        for event in self.events:
            kind = event["event"]
            if (kind == "failure" and not trains) or is_failed_start(event):
                yield event
            trains = kind == "start" or (trains and kind not in ("failure", "error"))


def read_story(run_dir: Path) -> Story:
    """The story of a run so far. Raises UserError for a folder that holds no run, and OSError."""
    path, locks = run_dir / "config.yaml", _ask(run_dir)
    try:
        events = [event for event in read_events(run_dir) if is_whole(event)]
        if not events and not os.path.lexists(path):
            raise UserError("no config.yaml and no event there")
        config = load_config(path) if path.exists() or not events else None
    except UserError as error:
        raise UserError(f"{run_dir} holds no run: {error}; give a run_dir") from None
    path = run_dir / METRICS_FILE
    rows = [row for row in read_rows(path) if _is_step(row)] if path.exists() else []
    sessions = tuple(sessions_of(events))
    if rows and sessions and sessions[-1].end is None:
        last_step, step_s = int(rows[-1]["step"]), rows[-1]["step_s"]
        now = went_on(sessions[-1], last_step, path.stat().st_mtime, step_s)
        sessions = (*sessions[:-1], now)
    run, job = map(_lasting, locks, _ask(run_dir))
    return Story(config, sessions, rows[-1] if rows else {}, events, run, job)


def _ask(run_dir: Path) -> tuple[Holding, Holding]:
    return ask(run_dir / RUN_LOCK), ask(run_dir / JOB_LOCK)


def _lasting(before: Holding, after: Holding) -> Holding:
    """What held while the files between two questions were read.

    A lock that was free at one of the two only does not mean that the run had ended.
    """
    return after if before == after else replace(after, held=before.held or after.held or None)


def _is_step(row: Mapping[str, Any]) -> bool:
    finite = row.get("loss") is None or has_numbers(row, "loss")
    return "loss" in row and finite and has_numbers(row, "tokens_seen", "tokens_per_s", "step_s")


def _overlap(parts: Sequence[range], whole: range) -> int:
    """How many of `whole` are in any of the parts, without counting them one by one."""
    count, begin = 0, whole.start
    for part in sorted(parts, key=lambda steps: steps.start):
        begin = max(begin, part.start)
        stop = min(part.stop, whole.stop)
        count += max(0, stop - begin)
        begin = max(begin, stop)
    return count


def _over(turns: Sequence[Mapping[str, Any]]) -> str:
    """The state of a run that has said that it ended: the last of its turns says how."""
    last, before = turns[-1], turns[-2] if len(turns) > 1 else turns[-1]
    if last["event"] == "gave_up":
        return f"given up: {last.get('why')}"
    if last["event"] == "error":
        return f"{'could not start' if is_failed_start(last) else 'failed'}: {end_of((last,))}"
    if last["event"] == "leave" and before["event"] == "stop":
        last = before
    return str(end_of((last,)))
