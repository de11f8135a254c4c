"""Which of the ranks this process is, as torchrun says in environment variables. No torch."""

from __future__ import annotations

import os

from megascale.errors import RankError

MOST_PORT = 2**16 - 1
MOST_WORLD = 2**31 - 1
ATTEMPT = "attempt-"
"""How the rendezvous of an attempt begins, which `megascale launch` starts."""


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun sets them; (0, 1, 0) when it did not.

    Raises RankError for a variable that is missing or cannot be.
    """
    world = _number("WORLD_SIZE", 1, 1, MOST_WORLD)
    rank = _number("RANK", 0, 0, MOST_WORLD)
    if rank >= world:
        raise RankError(f"RANK = {rank} must be below WORLD_SIZE = {world}; {_REMEDY}")
    _number("LOCAL_WORLD_SIZE", 1, 1, world)
    local_rank = _number("LOCAL_RANK", 0, 0, MOST_WORLD)
    if world > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise RankError(f"WORLD_SIZE = {world}, but {name} is not set; {_REMEDY}")
    if os.environ.get("MASTER_ADDR"):
        _number("MASTER_PORT", 1, 0 if world == 1 else 1, MOST_PORT)  # one rank may take any
    return rank, world, local_rank


def meeting_point() -> str:
    """Where the ranks of this world meet, as host:port."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def is_driven() -> bool:
    """Whether `megascale launch` has started this rank."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(ATTEMPT)


_REMEDY = (
    "start it with megascale train --ranks N on one machine, or with torchrun or megascale launch, "
    "which set the variables, or unset all of them"
)


def _number(name: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise RankError(
            f"{name} = '{text}' must be a whole number from {least} to {most}; {_REMEDY}"
        )
    return int(text)
