"""From checkpoints and an operator to a larger checkpoint: its model and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megascale.checkpoint.read import ROUTER_STATE
from megascale.checkpoint.shards import MOMENTS
from megascale.checkpoint.tensors import Piece, Tensors, moment_key
from megascale.config import ModelConfig, MoeConfig
from megascale.errors import UserError
from megascale.growth.depth import add_random, deepen, interpolated, stacked
from megascale.growth.learn import Maps, combined
from megascale.growth.model import Growth, grown_model
from megascale.growth.resize import resize, resize_moment
from megascale.growth.upcycle import upcycle
from megascale.growth.width import widen, widen_moment
from megascale.model.initialise import CLOSED_TOKENS
from megascale.optim.soap import SIDES


def grow(
    parents: Sequence[tuple[ModelConfig, Tensors]], growth: Growth, maps: Maps | None = None
) -> tuple[ModelConfig, Iterator[Piece]]:
    """The grown model, and its tensors, which are read from the parents as they are taken.

    `maps` are those of `learn`, where they have been learned.
    Raises UserError where the parents do not suit the operator.
    """
    model, base = parents[0]
    if growth.operator == "upcycle":
        _check_branches(parents, growth.moe or MoeConfig())
    elif len(parents) > 1:
        raise UserError(f"operator {growth.operator} grows one checkpoint, not {len(parents)}")
    grown = grown_model(model, growth)
    if growth.operator == "upcycle":
        return grown, upcycle([tensors for _, tensors in parents], grown, growth.seed)
    if growth.operator == "width":
        return grown, widen(base, growth.factor, model.tied_embeddings, growth.seed)
    if growth.operator == "random":
        return grown, add_random(base, model.num_layers, grown, growth.seed)
    if growth.operator == "resize":
        old, new = model.vocab_size or 0, grown.vocab_size or 0
        return grown, resize(base, old, new, growth.noise, growth.seed)
    if growth.operator == "learn":
        return grown, combined(base, growth.factor, maps or {})
    order = interpolated if growth.operator == "interpolate" else stacked
    sources = order(model.num_layers, growth.factor)
    silent = range(model.num_layers, len(sources)) if growth.operator == "zero" else ()
    return grown, deepen(base, sources, silent, noise=growth.noise, seed=growth.seed)


def grow_moments(model: ModelConfig, checkpoint: Tensors, growth: Growth) -> Iterator[Piece]:
    """AdamW's moments for the grown model, which begins with more of them than zeros.

    A copied layer has the moments of the layer that it copies, a new one that adds nothing at first
    has zeros. A wider model has those that its own gradients would have given, were no noise added
    (`widen_moment`). Raises UserError where the checkpoint has none, or no rule is known.
    """
    if growth.operator in ("upcycle", "learn"):
        raise UserError(
            f"--optimizer grow: there is no rule for moments under --operator {growth.operator}; "
            "leave them behind with --optimizer drop"
        )
    of_soap = any(Tensors(checkpoint.found, f"{side}_average").shapes for side in SIDES)
    for power, name in enumerate(MOMENTS, start=1):
        moment = Tensors(checkpoint.found, name)
        if of_soap or moment.shapes.keys() != _trained(checkpoint):
            raise UserError(
                f"checkpoint {checkpoint.found.folder} holds no moments of AdamW that could grow; "
                "leave them behind with --optimizer drop"
            )
        for piece in _moment(model, moment, growth, power):
            yield replace(piece, key=moment_key(name, piece.key))


def _moment(model: ModelConfig, moment: Tensors, growth: Growth, power: int) -> Iterator[Piece]:
    old, factor = model.num_layers, growth.factor
    if growth.operator == "resize":
        new = grown_model(model, growth).vocab_size or 0
        return resize_moment(moment, model.vocab_size or 0, new)
    if growth.operator == "width":
        return widen_moment(moment, factor, model.tied_embeddings, power)
    order = interpolated if growth.operator == "interpolate" else stacked
    new = range(old, old * factor) if growth.operator in ("zero", "random") else ()
    return deepen(moment, order(old, factor), new, silenced=("",))


def _trained(checkpoint: Tensors) -> set[str]:
    """Keys of the weights, without the counts that layers and routers keep."""
    return {key for key in checkpoint.shapes if not key.endswith((*ROUTER_STATE, CLOSED_TOKENS))}


def _check_branches(parents: Sequence[tuple[ModelConfig, Tensors]], moe: MoeConfig) -> None:
    model, first = parents[0][0], parents[0][1].found.folder
    for other, tensors in parents:
        if other != model:
            raise UserError(
                f"{tensors.found.folder} is not of the same model as {first}; "
                "experts come from branches of one model"
            )
    if model.moe is not None:
        raise UserError(f"{first} has experts already; upcycle a dense one")
    if model.parallel_block:
        raise UserError("a model with model.parallel_block cannot have experts")
    if len(parents) > moe.num_experts:
        raise UserError(f"{len(parents)} branches do not fit {moe.num_experts} experts")
    if not 2 <= moe.top_k <= moe.num_experts:
        raise UserError(
            f"top-k {moe.top_k} must be from 2 to the {moe.num_experts} experts; one expert alone "
            "is weighted by its probability, which would shrink what the dense model says"
        )
    if moe.attention_experts % len(parents) and moe.attention_experts > 1:
        raise UserError(
            f"{moe.attention_experts} attention experts cannot come evenly from {len(parents)} "
            f"branches; {len(parents)} would"
        )
