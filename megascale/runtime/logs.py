"""What each rank notes for later: warnings and tracebacks go to logs/rank<r>.log."""

from __future__ import annotations

import logging
from pathlib import Path


def log_to(folder: Path, rank: int) -> None:
    """Send log records and Python warnings of this process to `folder`/rank<r>.log.

    The console is for the user; libraries' warnings would drown it, once for every rank.
    """
    handler = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


def note_failure(error: BaseException) -> None:
    """Write the traceback of what ends the run into the log."""
    logging.getLogger("megascale").error("the run failed", exc_info=error)
