"""Which ranks share a node, and an order in which each meets each other once."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence


def tournament(n: int) -> list[list[int]]:
    """The opponent of each of n in every round, so that each meets each once; itself: it rests.

    n - 1 rounds, one more where n is odd (the circle method).
    """
    seats = list(range(n + n % 2))
    rounds = []
    for _ in range(len(seats) - 1):
        opponent = list(range(n))
        for a, b in zip(seats, reversed(seats), strict=True):
            if a < n and b < n:
                opponent[a] = b
        rounds.append(opponent)
        seats[1:] = [seats[-1], *seats[1:-1]]
    return rounds


def meetings(hosts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """(kind, whom every rank meets) of every round: first ranks of a node, then nodes.

    Between nodes those meet that are equally placed in theirs, so all adapters are tested at once.
    """
    members = members_of(hosts)
    rounds = []
    most = max(len(ranks) for ranks in members)
    games = {len(ranks): tournament(len(ranks)) for ranks in members}
    for number in range(len(tournament(most))):
        opponent = list(range(len(hosts)))
        for ranks in members:
            if number < len(games[len(ranks)]):
                for place, other in enumerate(games[len(ranks)][number]):
                    opponent[ranks[place]] = ranks[other]
        rounds.append(("in-node", opponent))
    for game in tournament(len(members)):
        opponent = list(range(len(hosts)))
        for node, other in enumerate(game):
            for mine, theirs in zip(members[node], members[other], strict=False):
                opponent[mine] = theirs
        rounds.append(("between-nodes", opponent))
    return rounds


def node_name() -> str:
    """What this machine is called: Slurm's name of the node, else the host's."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def members_of(hosts: Sequence[str]) -> list[list[int]]:
    """The ranks of each node, in the order of their first ones."""
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    return list(by_host.values())
