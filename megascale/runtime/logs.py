"""What each rank notes for later: warnings and tracebacks go to logs/rank<r>.log."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

STARTER_VARIABLE = "MEGASCALE_STARTER"
"""Id of the process that started this rank and speaks for it; set by `resilience.local_ranks`."""


def log_to(folder: Path, rank: int) -> None:
    """Send log records and Python warnings of this process to `folder`/rank<r>.log.

    The console is for the user; libraries' warnings would drown it, once for every rank. Where
    another process speaks for this rank, all that is written to stderr goes there too.
    """
    handler = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if STARTER_VARIABLE in os.environ:
        os.dup2(handler.stream.fileno(), 2)


def note_failure(error: BaseException) -> None:
    """Write the traceback of what ends the run into the log, once."""
    if vars(error).get("is_noted"):
        return
    vars(error)["is_noted"] = True
    logging.getLogger("megascale").error("the run failed", exc_info=error)


def say(text: str) -> None:
    """Print a line for the user. A terminal or a pipe that is gone must not stop a run."""
    try:
        print(text, flush=True)
    except OSError:
        # what waits in the buffer, and all that follows, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
