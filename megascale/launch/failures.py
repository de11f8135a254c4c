"""What broke, and whether it is worth another try: no run is started again for ever.

All of it is in `events.jsonl` of the run, so the count goes on when Slurm requeues the job:

launch    a driver began: job, restarts of the job, nodes
attempt   ranks were started: number of the attempt, nodes, world, nodes left out and why
failure   an attempt failed: step reached, step of the latest checkpoint, error, rank, node, kind of
          the cause, and whether the ranks were still starting
gave_up   the run is not started again by itself, and why
slow      the others wait for a rank
hang      no rank moves: which did not come to where the others wait, and the folder of stacks
leave     a driver ended, and why
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

from megascale.checkpoint.folder import checkpoints_dir, read_latest
from megascale.errors import UserError
from megascale.monitor.events import EventLog, at, read_events
from megascale.monitor.metrics import METRICS_FILE, last_step
from megascale.monitor.rank_states import HEARTBEATS_FILE
from megascale.runtime.files import write_file

SAME_FAILURES = 3
"""So many failures with the same error at the same step are a crash loop."""
FAILURES_WITHOUT_A_SAVE = 10
"""So many failures in a row after the same checkpoint, whatever they were, are one too."""
KILLS_AT_START = 20
"""So many kills in a row, each before an attempt has done a step, end the run."""
MOST_BACKOFF_S = 60.0
RETRY_S = 1.0
DIARY_S = 60.0
"""For a full disk, before a run is given up because its failures cannot be written down."""
NOT_KEPT = "cannot be written, so failures cannot be counted"
MAKE_ROOM = "make room or access in its run_dir"
NO_TIME = "the time limit came before anything new was saved; ask for more time"
WITHOUT_A_WORD = "the job ended without a word (a lost node, or SIGKILL before all was saved)"
FAULT, KILL, MISTAKE = "fault", "kill", "mistake"
"""Kinds of causes: an error of the program or of a machine; SIGKILL, SIGTERM or the loss of a node,
which say nothing of the run; and bad input, which is the same at every try."""
KILLED = "killed by "
PEER_GONE = re.compile(
    r"closed by (the )?(remote )?peer|reset by peer|broken pipe|remote process|connection refused"
    r"|DistBackendError|timed out|timeout|FirstRankError",
    re.IGNORECASE,
)
"""What ranks say when another rank is gone or has failed."""


@dataclass(frozen=True)
class Cause:
    """Why ranks ended, as one of their agents saw it."""

    error: str
    time: float
    """Seconds since the epoch."""
    rank: int | None = None
    """Of the rank that failed, where it was a rank."""
    node: str | None = None
    """Name of the node."""
    kind: str = FAULT
    """FAULT, KILL or MISTAKE."""

    @staticmethod
    def from_json(value: Any) -> Cause:
        """A cause as `dataclasses.asdict` gave it. Raises TypeError or ValueError otherwise."""
        cause = Cause(**value)
        kinds = {
            "error": str,
            "time": int | float,
            "rank": int | None,
            "node": str | None,
            "kind": str,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(cause, name), kind):
                raise ValueError(f"{name} is of the wrong type")
        return cause

    @property
    def lost_a_peer(self) -> bool:
        """Whether it says no more than that another rank is gone."""
        return PEER_GONE.search(self.error) is not None

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, so that it could say nothing."""
        return self.error.startswith(KILLED)

    def to_json(self) -> dict[str, Any]:
        """As plain values for `json.dump`."""
        return asdict(self)

    def __str__(self) -> str:
        who = [f"rank {self.rank}"] if self.rank is not None else []
        where = [f"node {self.node}"] if self.node is not None else []
        return f"{' on '.join(who + where)}: {self.error}" if who or where else self.error


def killed_by(number: int) -> tuple[str, str]:
    """(words for a death by that signal, the kind of the cause)."""
    kind = KILL if number in (SIGKILL, SIGTERM) else FAULT
    return f"{KILLED}{Signals(number).name}", kind


def cause_of_rank(rank: int, status: int, message: str | None, when: float) -> Cause:
    """Why a rank ended with `status`, not 0; `message` is its exception, where it has left one.

    Bad input is a mistake where it is everybody's, and no file system refused its service.
    """
    if status < 0:
        how, kind = killed_by(-status)
        return Cause(how, when, rank, kind=kind)
    if message is None:
        return Cause(f"ended with status {status}", when, rank)
    is_mistake = status == 2 and message.startswith(f"{UserError.__name__}: ")
    return Cause(message, when, rank, kind=MISTAKE if is_mistake else FAULT)


def culprit(causes: Sequence[Cause]) -> Cause:
    """The cause that the others follow from: not a lost peer if possible, then the earliest."""
    return min(causes, key=lambda one: (one.lost_a_peer, one.time))


class FailureBook:
    """Keeps the failures of a run and judges them; used by the one driver that leads."""

    def __init__(self, run_dirs: Sequence[str], job: str | None) -> None:
        """`run_dirs` are the folders that the run writes, its own last; `job` is Slurm's id.

        Raises OSError where its own folder cannot be written.
        """
        self._folders = [Path(folder) for folder in run_dirs]
        self._folders[-1].mkdir(parents=True, exist_ok=True)
        self._job = job
        self._log = EventLog(self._folders[-1])
        self._saved_before = 0

    def begin(self, **facts: Any) -> str | None:
        """Note that a driver starts; why it must not, or None.

        A job that gave up stays so when it is requeued; one that is submitted anew begins anew.
        """
        last = next((e for e in reversed(self._events()) if e["event"] in _ENDS), None)
        if last and last["event"] == "gave_up" and self._job and last.get("job") == self._job:
            return str(last["why"])
        verdict = None
        if _ended_without_a_word(self._events()):
            verdict = self.failed(Cause(WITHOUT_A_WORD, 0.0, kind=KILL))
        if verdict is None:
            self._saved_before = self._saved()
            self._log.write("launch", job=self._job, step=self._step(), **facts)
        return verdict

    def attempt(self, **facts: Any) -> None:
        """Note that ranks are started."""
        self._log.write("attempt", **facts)

    def failed(self, cause: Cause) -> str | None:
        """Note a failure; the reason to give up, or None."""
        facts = {"rank": cause.rank, "node": cause.node, "cause": cause.kind}
        facts["starting"] = not self.has_stepped()
        self._log.write(
            "failure", step=self._step(), saved=self._saved(), error=cause.error, **facts
        )
        kept = self.is_kept()
        why = self._verdict() if kept else f"{self._folders[-1]} {NOT_KEPT}"
        if why is not None:
            self._log.write("gave_up", why=why, job=self._job)
        return why

    def note(self, kind: str, **facts: Any) -> None:
        """Note what was seen of ranks."""
        self._log.write(kind, **facts)

    def keep_heartbeats(self, text: str) -> None:
        """Keep how the ranks are for `megascale status`; not being able to harms nothing."""
        path = self._folders[-1] / HEARTBEATS_FILE
        with contextlib.suppress(OSError):
            write_file(path, text)

    def backoff_s(self, first_s: float) -> float:
        """How long to wait before the next attempt: twice as long for every one without a save."""
        in_a_row = len(_without_a_save(recent_failures(self._events())))
        return float(min(MOST_BACKOFF_S, first_s * 2.0 ** max(0, in_a_row - 1)))

    def leave(self, why: str, time_is_up: bool) -> str | None:
        """Note that the driver ends; the reason to give up, or None.

        A job whose time was up before it could save anything new is a failure like others.
        """
        if time_is_up and self._saved() == self._saved_before:
            verdict = self.failed(Cause(NO_TIME, 0.0))
            if verdict is not None:
                return verdict
        self._log.write("leave", why=why, step=self._step())
        return None

    def is_kept(self) -> bool:
        """Whether all that was noted is in the folder of the run, within a minute."""
        deadline = time.monotonic() + DIARY_S
        while not (kept := self._log.settle()) and time.monotonic() < deadline:
            time.sleep(RETRY_S)
        return kept

    def has_stepped(self) -> bool:
        """Whether the ranks of the last attempt have done a step."""
        attempts = [at(event) for event in self._events() if event["event"] == "attempt"]
        began = attempts[-1] if attempts else 0.0
        for folder in reversed(self._folders):
            starts = [one for one in read_events(folder) if one["event"] == "start"]
            if starts and at(starts[-1]) > began:
                return last_step(folder) > int(starts[-1]["step"])
        return False

    def _verdict(self) -> str | None:
        why = verdict(self._events())
        error = self._save_error()
        if why is None and error is not None:
            why = f"no checkpoint could be written ({error}), so it would begin anew; {MAKE_ROOM}"
        return why

    def _save_error(self) -> str | None:
        """Why no checkpoint of this run could be written; None where one was, or none was tried."""
        if self._saved():
            return None
        events = [one for folder in self._folders for one in since_given_up(read_events(folder))]
        saves = [event for event in events if event["event"] == "save"]
        failed = [event["error"] for event in saves if event.get("error") is not None]
        return str(failed[-1]) if failed and len(failed) == len(saves) else None

    def _events(self) -> list[dict[str, Any]]:
        return read_events(self._folders[-1])

    def _step(self) -> int:
        written = [folder for folder in self._folders if (folder / METRICS_FILE).exists()]
        return last_step(written[-1]) if written else 0

    def _saved(self) -> int:
        saved = [read_latest(checkpoints_dir(folder)) for folder in reversed(self._folders)]
        return next((step for step in saved if step is not None), 0)


_ENDS = ("launch", "leave", "gave_up")


def _ended_without_a_word(events: Sequence[dict[str, Any]]) -> bool:
    """Whether the last driver is gone, and neither it nor its ranks have said that they end."""
    for event in reversed(events):
        if event["event"] in ("leave", "gave_up", "stop", "error"):
            return False
        if event["event"] in ("launch", "attempt"):
            return True
    return False


def recent_failures(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The failures since the run was last given up, oldest first."""
    return [one for one in since_given_up(events) if one["event"] == "failure"]


def since_given_up(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events since the run was last given up, oldest first."""
    return list(takewhile(lambda one: one["event"] != "gave_up", reversed(events)))[::-1]


def verdict(events: Sequence[dict[str, Any]]) -> str | None:
    """Why a run with this diary should not be started once more, or None."""
    failures = recent_failures(events)
    if not failures:
        return None
    last = failures[-1]
    if last.get("cause") == MISTAKE and last.get("starting"):
        return f"this must be mended first: {last['error']}"
    if _killed_at_start(last):
        kills = list(takewhile(_killed_at_start, reversed(failures)))
        if len(kills) < KILLS_AT_START:
            return None
        return f"{len(kills)} attempts in a row ended before their first step: {last['error']}"
    failures = [one for one in failures if not _killed_at_start(one)]
    same = list(takewhile(lambda one: _kind(one) == _kind(last), reversed(failures)))
    if len(same) >= SAME_FAILURES:
        return f"{len(same)} times the same failure at step {last['step']}: {last['error']}"
    stuck = _without_a_save(failures)
    if len(stuck) >= FAILURES_WITHOUT_A_SAVE:
        return (
            f"{len(stuck)} failures in a row without a checkpoint after step {last['saved']}; "
            f"the last: {last['error']}"
        )
    return None


def _killed_at_start(failure: dict[str, Any]) -> bool:
    """Whether it came from outside, before the run could show whether it works."""
    return failure.get("cause") == KILL and bool(failure.get("starting"))


def _without_a_save(failures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The latest failures between which no checkpoint was written."""
    return list(takewhile(lambda one: one["saved"] == failures[-1]["saved"], reversed(failures)))


def _kind(failure: dict[str, Any]) -> tuple[int, str]:
    """What two failures must share to be the same: numbers in the error may differ."""
    error = str(failure["error"]).strip().split("\n")[0]
    return failure["step"], re.sub(r"0x[0-9a-f]+|\d+", "N", error)
