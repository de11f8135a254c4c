"""What a launcher such as torchrun tells a rank in environment variables."""

from __future__ import annotations

import os

from megascale.errors import RankError

_HINT = "start ranks with torchrun or megascale launch, or unset RANK and WORLD_SIZE to train alone"
MOST_PORT = 65535


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun sets them; (0, 1, 0) when it did not.

    Raises RankError where they do not make up a world.
    """
    rank, world = _whole("RANK", 0), _whole("WORLD_SIZE", 1)
    if rank >= world:
        given = f"RANK = {rank}, WORLD_SIZE = {os.environ.get('WORLD_SIZE', 'not set')}"
        raise RankError(f"{given}: ranks are below WORLD_SIZE; {_HINT}")
    if world > 1:
        missing = [
            name
            for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            if not os.environ.get(name)
        ]
        if missing:
            raise RankError(f"WORLD_SIZE = {world} without {', '.join(missing)}; {_HINT}")
    if os.environ.get("MASTER_ADDR"):
        _require_port(world)
    return rank, world, _whole("LOCAL_RANK", 0)


def meeting_point() -> str:
    """Where the ranks of this world meet, as host:port."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RankError(f"{name} = '{text}' is no whole number from 0; {_HINT}")
    return int(text)


def _require_port(world: int) -> None:
    port = _whole("MASTER_PORT", MOST_PORT + 1)
    lowest = 0 if world == 1 else 1  # a rank alone may take any free port
    if not lowest <= port <= MOST_PORT:
        given = os.environ.get("MASTER_PORT") or "not set"
        raise RankError(f"MASTER_PORT = {given} is no port; give one from 1 to {MOST_PORT}")
