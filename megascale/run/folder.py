"""A run folder is a run: who may write in it, and what lies where."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from megascale.checkpoint.folder import checkpoints_dir
from megascale.checkpoint.load import find
from megascale.errors import UserError, reason
from megascale.monitor.events import EVENTS_FILE, EventLog, at, read_events
from megascale.monitor.metrics import last_step
from megascale.run.preflight import refuse_lost_folder, refuse_used_folder
from megascale.runtime.distributed import Ranks
from megascale.runtime.environment import is_driven
from megascale.runtime.files import open_lock, open_to_append, write_file
from megascale.runtime.first_rank import on_first_rank
from megascale.runtime.lock import HELD_S, RUN_LOCK, hold, lock_within
from megascale.runtime.logs import note_failure

ENDS = ("stop", "error")
"""Events with which a run says that it ends."""
TURN_S = 5.0
"""For another rank to write how the run ends."""


class RunFolder:
    """The folder of a run, held by one run at a time.

    Files: config.yaml (resolved), plan.txt, metrics.jsonl, events.jsonl, tensorboard/,
    checkpoints/<step>/, plots/, logs/.
    """

    def __init__(self, path: Path, lock: IO[str] | None, entered: float, command: str) -> None:
        self.path = path
        self._lock = lock
        self.events = EventLog(path)
        """The run's diary."""
        self.entered = entered
        """When this run began to make itself ready, in seconds since the epoch."""
        self.command = command
        """What a user types to continue the run."""
        self.has_started = False
        """The run has written that it starts."""

    @staticmethod
    def open(
        path: str, resume: str | None, ranks: Ranks, entered: float, command: str
    ) -> RunFolder:
        """Make the folder, or enter the one of a run that is continued.

        Raises UserError, on every rank, where it holds a run and `resume` is None, and where
        another run is writing in it.
        """
        folder = Path(path)
        lock = on_first_rank(ranks, lambda: _enter(folder, resume))
        return RunFolder(folder, lock, entered, command)

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all."""
        write_file(self.path / name, text)

    @contextmanager
    def noting_errors(self, ranks: Ranks) -> Iterator[None]:
        """As `noting_errors` below, for what happens in this folder."""
        with noting_errors(self.path, ranks, self):
            yield

    def close(self) -> None:
        """Let another run enter."""
        if self._lock is not None:
            self._lock.close()


@contextmanager
def noting_errors(run_dir: Path, ranks: Ranks, folder: RunFolder | None = None) -> Iterator[None]:
    """Write an error that ends the block into the log of this rank and the diary of the run.

    `folder` is the one of the run, where it is open already. Of several ranks that fail, the first
    one writes the event. Under `megascale launch` the launcher writes the event instead, because
    it also knows of ranks that were killed.
    """
    began = time.time() - 0.001  # events know milliseconds
    try:
        yield
    except BaseException as error:
        note_failure(error)
        if not is_driven():
            has_started = folder is not None and folder.has_started
            facts = {"error": reason(error), "rank": ranks.rank, "starting": not has_started}
            _write_error(folder.events if folder else EventLog(run_dir), run_dir, began, facts)
        raise


def _write_error(
    events: EventLog, run_dir: Path, began: float, facts: Mapping[str, object]
) -> None:
    """Write the event of an error, unless the run has said since `began` how it ends."""
    with ExitStack() as leave:
        with suppress(OSError):  # without locks or room, two events are better than none
            run_dir.mkdir(parents=True, exist_ok=True)
            file = leave.enter_context(open_to_append(run_dir / EVENTS_FILE))
            lock_within(file, TURN_S)
            written = [event for event in read_events(run_dir) if at(event) >= began]
            if any(event["event"] in ENDS for event in written):
                return
        events.write("error", step=last_step(run_dir), node=socket.gethostname(), **facts)


def _enter(folder: Path, resume: str | None) -> IO[str]:
    refuse_lost_folder(folder)
    if resume not in (None, "auto") and not checkpoints_dir(folder).is_dir():
        find(folder, "latest" if resume == "latest" else int(resume))  # says what is missing
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder / RUN_LOCK)
    except OSError as error:
        raise UserError(f"run_dir {folder}: {error.strerror}; choose a folder you own") from None
    try:
        _hold(lock, folder)
        refuse_used_folder(folder, resume)
    except BaseException:
        lock.close()
        raise
    return lock


def _hold(lock: IO[str], folder: Path) -> None:
    try:
        holder = hold(lock, HELD_S if is_driven() else 0.0)
    except OSError as error:
        raise UserError(
            f"run_dir {folder}: files there cannot be locked ({error.strerror}); choose a folder "
            "on another file system"
        ) from None
    if holder is not None:
        raise UserError(
            f"run_dir {folder} is in use by another run ({holder}); "
            "stop that one or set another run_dir"
        )
