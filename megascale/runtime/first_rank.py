"""What rank 0 does for all ranks: its result, or its error, reaches every rank.

An error on rank 0 alone would leave the other ranks waiting in their next collective.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

from megascale.errors import StorageError, UserError, file_problem
from megascale.runtime.distributed import Ranks, broadcast_bytes

T = TypeVar("T")
RESULT, USER_ERROR, STORAGE_ERROR, FAILURE = b"r", b"u", b"s", b"f"
"""What a message holds: the first byte says it."""


class FirstRankError(RuntimeError):
    """Rank 0 failed in what it did for all ranks. A note holds the traceback of rank 0."""


def from_first_rank(ranks: Ranks, ask: Callable[[], bytes]) -> bytes:
    """Call `ask` on rank 0; every rank gets its result. All ranks must call this.

    Raises on every rank what `ask` raises. A UserError keeps its text, and an OSError becomes a
    StorageError. Any other error stays as it is on rank 0; the other ranks raise FirstRankError.
    """
    message, failed = None, None
    if ranks.rank == 0:
        try:
            message = RESULT + ask()
        except Exception as error:
            failed, message = error, error_bytes(error)
    message = broadcast_bytes(message, ranks)
    if failed is not None and message[:1] == FAILURE:
        raise failed
    if message[:1] != RESULT:
        raise error_from(message)
    return message[1:]


def on_first_rank(ranks: Ranks, action: Callable[[], T]) -> T | None:
    """Call `action` on rank 0; its result there, None on the other ranks.

    All ranks must call this, and it raises what `from_first_rank` raises.
    """
    results: list[T] = []

    def act() -> bytes:
        results.append(action())
        return b""

    from_first_rank(ranks, act)
    return results[0] if results else None


def error_bytes(error: Exception) -> bytes:
    """An error of rank 0 as a message; `error_from` is the inverse."""
    if isinstance(error, UserError | OSError):
        kind = STORAGE_ERROR if isinstance(error, StorageError | OSError) else USER_ERROR
        plain = file_problem(error) if isinstance(error, OSError) else None
        return kind + (plain or str(error) or type(error).__name__).encode(errors="replace")
    what = f"on rank 0: {type(error).__name__}: {error}"
    note = "".join(traceback.format_exception(error))
    return FAILURE + f"{what}\0{note}".encode(errors="replace")


def error_from(message: bytes) -> Exception:
    """The error that `error_bytes` made `message` of, to be raised on any rank."""
    text = message[1:].decode()
    if message[:1] == USER_ERROR:
        return UserError(text)
    if message[:1] == STORAGE_ERROR:
        return StorageError(text)
    what, _, note = text.partition("\0")
    error = FirstRankError(what)
    error.add_note(note)
    return error
