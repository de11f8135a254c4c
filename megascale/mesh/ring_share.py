"""One rank's share of a ring, with the group over which the ring exchanges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megascale.planner.shares import Share


@dataclass(frozen=True)
class RingShare(Share):
    """One rank's part in a ring of two or more."""

    ranks: tuple[int, ...]
    """Global torch ranks of the ring, in ring order; this rank is `ranks[place]`."""
    group: Any
    """The one process group of the HDP axis, over which all rings exchange."""
    calls: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What attention is to compute at each hop; filled by the first layer, used by all."""
