"""The exceptions that a user may cause, and how they are shown."""

import difflib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

MOST_CHARS = 300
"""Of the reason for which a run ended."""
MOST_MESSAGE = 2000
"""Characters of bad input's one line; the middle of a longer one is left out."""

_ADVICE = {
    "give a path that this user may read or write, or change who may": "EACCES EPERM",
    "give a file": "EISDIR",
    "a part of this path is a file; give another path": "ENOTDIR",
    "give a path that is there": "ENOENT",
    "give another path": "ELOOP ENAMETOOLONG EINVAL EFBIG EILSEQ ENXIO ENODEV EXDEV",
    "move it away, or give another path": "EEXIST ENOTEMPTY",
    "give a path on a file system that takes files": "EROFS ENOTSUP",
    "make room there, or give another path": "ENOSPC EDQUOT",
    "see whether its disk or server works": "EIO ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN EREMOTEIO",
    "another program uses it; wait for that one to end": "EBUSY ETXTBSY",
    "allow more open files, with ulimit -n": "EMFILE ENFILE",
}
_ADVICE_OF = {
    getattr(errno, name): advice
    for advice, names in _ADVICE.items()
    for name in names.split()
    if hasattr(errno, name)
}
"""What works after an error of a file system that a user can mend."""


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


class MissingInput(UserError):
    """A corpus or a checkpoint of a run is not there. A plan can do without it."""


class RankError(UserError):
    """Bad input that this rank met and others did not, so that it must speak for itself."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the name of `known` that is nearest to `name`; empty without one."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


def file_problem(error: OSError) -> str | None:
    """The line for a file, a folder or a file system that a user can mend; None for other errors,
    and for those that do not name the path."""
    advice = _ADVICE_OF.get(error.errno or 0)
    if advice is None or not isinstance(error.filename, str | bytes):
        return None
    return f"{os.fsdecode(error.filename)}: {error.strerror}; {advice}"


@contextmanager
def plain_file_errors(unless: Callable[[OSError], bool] = lambda _: False) -> Iterator[None]:
    """Errors of files that a user can mend become bad input, in one line; others pass.

    So do those for which `unless` is true.

    A rank says it itself, since other ranks may be on nodes where the path can be used.
    """
    try:
        yield
    except OSError as error:
        problem = file_problem(error)
        if problem is None or unless(error):
            raise
        raise RankError(problem) from error


def reason(error: BaseException) -> str:
    """Why a run or a launcher ended with `error`, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once by a second signal"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:MOST_CHARS]
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
