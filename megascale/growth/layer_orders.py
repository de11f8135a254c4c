"""Which layer of a base each layer of a deeper model copies. Without torch."""

from __future__ import annotations

from collections.abc import Sequence


def stacked(num_layers: int, factor: int) -> list[int]:
    """G_stack: the layer of the base that each layer of the target copies, i mod `num_layers`."""
    return [target % num_layers for target in range(num_layers * factor)]


def interpolated(num_layers: int, factor: int) -> list[int]:
    """Each layer of the base, `factor` times in a row."""
    return [target // factor for target in range(num_layers * factor)]


def connection_rate(sources: Sequence[int]) -> float:
    """Share of neighbouring layers that were neighbours, in this order, in the base."""
    pairs = zip(sources, sources[1:], strict=False)
    kept = sum(after == before + 1 for before, after in pairs)
    return kept / max(1, len(sources) - 1)
