"""What each rank notes for later, in logs/rank<r>.log, and lines for the user on the console."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from pathlib import Path

from megascale.runtime.files import open_to_append

STARTER_VARIABLE = "MEGASCALE_STARTER"
"""Id of the process that started this rank and speaks for it; set by `launch.local_ranks`."""


def log_to(folder: Path, rank: int) -> None:
    """Send log records and Python warnings of this process to `folder`/rank<r>.log.

    The console is for the user; libraries' warnings would drown it, once for every rank. Where
    another process speaks for this rank, all that is written to stderr goes there too. A log that
    cannot be written costs a warning and not the run.
    """
    handler = _open_log(folder / f"rank{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if STARTER_VARIABLE in os.environ and isinstance(handler, logging.StreamHandler):
        os.dup2(handler.stream.fileno(), 2)


def _open_log(path: Path) -> logging.Handler:
    """Adds to a regular file; a pipe might let the rank wait for a reader."""
    try:
        file = io.BufferedWriter(open_to_append(path))
    except OSError as error:
        say(f"warning: no log of this rank: {error}; the run goes on")
        return logging.NullHandler()
    return logging.StreamHandler(io.TextIOWrapper(file, "utf-8", errors="backslashreplace"))


def note_failure(error: BaseException) -> None:
    """Write the traceback of what ends the run into the log, once."""
    if is_noted(error):
        return
    vars(error)["is_noted"] = True
    logging.getLogger("megascale").error("the run failed", exc_info=error)


def is_noted(error: BaseException) -> bool:
    """Whether the log has the traceback of an error."""
    return bool(vars(error).get("is_noted"))


def say(text: str) -> None:
    """Print a line for the user; a console that cannot take it costs the line and not the run.

    A console whose reader is gone takes nothing more. One on a full disk is tried again.
    """
    try:
        _print(text)
    except (OSError, ValueError) as error:
        logging.getLogger("megascale").warning("the console does not take lines: %s", error)
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            _silence()


def settle_console() -> None:
    """Write what the console has not taken so far, or leave it out: the end comes without error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _silence()


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        known = getattr(sys.stdout, "encoding", None) or "ascii"
        print(text.encode(known, "backslashreplace").decode(known), flush=True)


def _silence() -> None:
    """Lead standard output nowhere; a later flush, as that at exit, then finds no error."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
