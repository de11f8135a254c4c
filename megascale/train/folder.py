"""A run folder is a run: who may write in it, and what lies where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

from megascale.errors import StorageError, UserError
from megascale.resilience.driver import is_driven
from megascale.resilience.lock import HELD_S, hold
from megascale.runtime.distributed import Ranks, broadcast_bytes
from megascale.train.ready import refuse_used_folder

Value = TypeVar("Value")
_STORAGE = "!"
"""Begins a problem of rank 0 that is one of a file system."""


class RunFolder:
    """The folder of a run, held by one run at a time.

    Files: config.yaml (resolved), plan.txt, metrics.jsonl, events.jsonl, tensorboard/,
    checkpoints/<step>/, plots/, logs/.
    """

    def __init__(self, path: Path, lock: IO[str] | None, entered: float) -> None:
        self.path = path
        self._lock = lock
        self.entered = entered
        """When this run began to make itself ready, in seconds since the epoch."""

    @staticmethod
    def open(path: str, resume: str | None, ranks: Ranks, entered: float) -> RunFolder:
        """Make the folder, or enter the one of a run that is continued.

        Raises UserError, on every rank, where it holds a run and `resume` is None, and where
        another run is writing in it.
        """
        folder = Path(path)
        held: list[IO[str]] = []
        on_first_rank(ranks, lambda: held.append(_enter(folder, resume)))
        return RunFolder(folder, held[0] if held else None, entered)

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def close(self) -> None:
        """Let another run enter."""
        if self._lock is not None:
            self._lock.close()


def on_first_rank(ranks: Ranks, action: Callable[[], object]) -> None:
    """Run `action` on rank 0; all ranks raise its UserError, and a StorageError for its OSError."""
    problem = ""
    if ranks.rank == 0:
        try:
            action()
        except (UserError, OSError) as error:
            is_storage = isinstance(error, (StorageError, OSError))
            problem = f"{_STORAGE if is_storage else ' '}{str(error) or type(error).__name__}"
    problem = broadcast_bytes(problem.encode(), ranks).decode()
    if problem:
        kind = StorageError if problem[0] == _STORAGE else UserError
        raise kind(problem[1:])


def _enter(folder: Path, resume: str | None) -> IO[str]:
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir {folder}: {error.strerror}; choose a folder you own") from None
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
    refuse_used_folder(folder, resume)
    return lock
