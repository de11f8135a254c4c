"""A run folder is a run: who may write in it, and what lies where."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from megascale.errors import UserError
from megascale.resilience.driver import is_driven
from megascale.resilience.lock import HELD_S, hold
from megascale.runtime.distributed import Ranks
from megascale.runtime.together import on_first_rank


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
        lock = on_first_rank(ranks, lambda: _enter(folder, resume))
        return RunFolder(folder, lock, entered)

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
    if resume is None and (folder / "config.yaml").exists():
        raise UserError(
            f"run_dir {folder} already holds a run; continue it with --resume auto, or branch "
            "off into a new folder with run_dir=..."
        )
    return lock
