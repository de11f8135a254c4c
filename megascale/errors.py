"""The exceptions that a user may cause, and how they are shown."""

from pathlib import Path
from shlex import quote

MOST_CHARS = 300
"""Of the reason for which a run ended."""
MOST_MESSAGE = 2000
"""Characters of bad input's one line; the middle of a longer one is left out."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where, and what would work.

    The command line prints the line and exits with status 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MOST_MESSAGE:
            message = f"{message[: MOST_MESSAGE // 2]} ... {message[-MOST_MESSAGE // 4 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class StorageError(UserError):
    """A file system did not do what it was asked; it may at another time, or on another node."""


class RankError(UserError):
    """Bad input that this rank met and others did not, so that it must speak for itself."""


def install_command(extra: str) -> str:
    """What installs an optional part of megascale, which is on no package index: its checkout."""
    checkout = Path(__file__).parents[1]
    where = checkout if (checkout / "pyproject.toml").is_file() else Path(".")
    begin = "" if where == checkout else "in the checkout of megascale: "
    return f"{begin}pip install -e {quote(f'{where}[{extra}]')}"


def reason(error: BaseException) -> str:
    """Why a run or a launcher ended with `error`, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once by a second signal"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:MOST_CHARS]
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
