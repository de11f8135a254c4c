"""Deeper models (Stacking Your Transformers, arXiv 2405.15319, sections 4.1 and 4.5)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import torch

from megascale.checkpoint.tensors import Piece, Tensors
from megascale.growth.tensors import OUTPUT_PROJECTIONS, generator, is_layered


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


def deepen(
    base: Tensors, sources: Sequence[int], silent: Container[int] = (), noise: float = 0.0
) -> Iterator[Piece]:
    """The base's tensors with layer i a copy of its layer `sources[i]`.

    The `silent` layers get output projections of 0, so that they add nothing to the residual
    stream (G_zero). `noise` a mixes a random matrix into each of a layer, (1 - a) W + a e, with
    the variances of section 4.4 of the paper.
    """
    for key, shape in base.shapes.items():
        if not is_layered(key):
            yield Piece.whole(key, base.read(key))
            continue
        for target, source in enumerate(sources):
            layer = base.read(key, (source,), (1,))
            if target in silent and key.endswith(OUTPUT_PROJECTIONS):
                layer = torch.zeros_like(layer)
            elif noise and layer[0].dim() > 1:
                layer = (1 - noise) * layer + noise * _noise(key, layer, target, len(sources))
            offset = (target, *(0 for _ in shape[1:]))
            yield Piece(key, (len(sources), *shape[1:]), offset, layer)


def _noise(key: str, layer: torch.Tensor, target: int, num_layers: int) -> torch.Tensor:
    projects_out = key.endswith(OUTPUT_PROJECTIONS)
    hidden = layer.shape[-2] if projects_out else layer.shape[-1]
    variance = 1 / (hidden * num_layers**2) if projects_out else 2 / (5 * hidden)
    drawn = torch.randn(layer.shape, generator=generator(f"{key}/{target}"))
    return (drawn * variance**0.5).to(layer)
