"""One micro-batch of a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ring:
    """One micro-batch: whole sequences computed together by a set of ranks."""

    id: int
    """Increasing in execution order; every rank runs its rings in this order."""
    ranks: tuple[int, ...]
    """Ranks of the HDP axis that share each of the sequences equally."""
    sequences: tuple[int, ...]
    """Indices into the step's lengths; none means a padding micro-batch."""
    offload: float
    """Part of the activations of all layers but two that is kept in host memory, 0 to 1."""
    index: int
    """Number of the micro-batch on its ranks."""
