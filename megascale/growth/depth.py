"""Deeper models (Stacking Your Transformers, arXiv 2405.15319, sections 4.1 and 4.5)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import torch

from megascale.checkpoint.tensors import Piece, Tensors
from megascale.config import ModelConfig
from megascale.errors import UserError
from megascale.growth.tensor_names import CLOSED, is_layered
from megascale.model.initialise import OUTPUT_PROJECTIONS, initial, named_generator


def deepen(
    base: Tensors,
    sources: Sequence[int],
    silent: Container[int] = (),
    silenced: tuple[str, ...] = OUTPUT_PROJECTIONS,
    noise: float = 0.0,
    seed: int = 0,
) -> Iterator[Piece]:
    """The base's tensors with layer i a copy of its layer `sources[i]`.

    The `silent` layers get zeros where a key ends like one of `silenced`: the output projections,
    so that they add nothing to the residual stream (G_zero). `noise` a mixes a random matrix into
    each of a layer, (1 - a) W + a e, with the variances of section 4.4 of the paper.
    """
    for key in base.shapes:
        if not is_layered(key):
            yield Piece.whole(key, base.read(key))
            continue
        for target, source in enumerate(sources):
            layer = base.read(key, (source,), (1,))
            if target in silent and key.endswith(silenced):
                layer = torch.zeros_like(layer)
            elif noise and layer[0].dim() > 1:
                layer = (1 - noise) * layer + noise * _noise(
                    key, layer, named_generator(f"{key}/{target}", seed), len(sources)
                )
            yield _of_layer(key, len(sources), target, layer)


def add_random(base: Tensors, old: int, model: ModelConfig, seed: int) -> Iterator[Piece]:
    """The base's `old` layers, and above them random ones, closed, up to those of `model`.

    Raises UserError where masks of the base are not open yet, since there is one rate of opening.
    """
    new = model.num_layers
    for key in base.shapes:
        if key == CLOSED:
            _require_open(base)
            continue
        if not is_layered(key):
            yield Piece.whole(key, base.read(key))
            continue
        for layer in range(new):
            if layer < old:
                yield _of_layer(key, new, layer, base.read(key, (layer,), (1,)))
            else:
                like = base.read(key, (0,), (1,))
                yield _of_layer(key, new, layer, _drawn(key, layer, like, model, seed))
    assert model.mask_tokens is not None
    closed = torch.full((new, 1), model.mask_tokens, dtype=torch.int64)
    closed[:old] = 0
    yield Piece.whole(CLOSED, closed)


def _require_open(base: Tensors) -> None:
    left = int(base.read(CLOSED).max())
    if left:
        raise UserError(
            f"{base.found.folder} has layers that are still masked; train it for {left:,} more "
            "tokens before it gets new ones"
        )


def _drawn(key: str, layer: int, like: torch.Tensor, model: ModelConfig, seed: int) -> torch.Tensor:
    """Initial weights in place of `like`, the tensor of one layer, expert by expert."""
    if like.dim() < 4:  # only the experts of feed-forward layers share a tensor
        return initial(key, (layer,), tuple(like.shape[1:]), model, seed)[None].to(like)
    each = [
        initial(key, (layer, expert), tuple(like.shape[2:]), model, seed)
        for expert in range(like.shape[1])
    ]
    return torch.stack(each)[None].to(like)


def _of_layer(key: str, num_layers: int, layer: int, tensor: torch.Tensor) -> Piece:
    shape = tuple(tensor.shape[1:])
    return Piece(key, (num_layers, *shape), (layer, *(0 for _ in shape)), tensor)


def _noise(
    key: str, layer: torch.Tensor, generator: torch.Generator, num_layers: int
) -> torch.Tensor:
    projects_out = key.endswith(OUTPUT_PROJECTIONS)
    hidden = layer.shape[-2] if projects_out else layer.shape[-1]
    variance = 1 / (hidden * num_layers**2) if projects_out else 2 / (5 * hidden)
    drawn = torch.randn(layer.shape, generator=generator)
    noise: torch.Tensor = (drawn * variance**0.5).to(layer)
    return noise
