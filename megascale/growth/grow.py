"""From checkpoints and an operator to a larger checkpoint: its model and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megascale.checkpoint.tensors import Piece, Tensors
from megascale.config import ModelConfig, MoeConfig
from megascale.errors import UserError
from megascale.growth.depth import deepen, interpolated, stacked
from megascale.growth.upcycle import upcycle
from megascale.growth.width import widen

Operator = Literal["stack", "interpolate", "zero", "width", "upcycle"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)


@dataclass(frozen=True)
class Growth:
    """What to do to a model."""

    operator: Operator = "stack"
    """`stack`: layers 1 to l again and again (G_stack). `interpolate`: every layer several times
    in a row. `zero`: as `stack`, but the new layers add nothing at first. `width`: more hidden
    units, heads and feed-forward units that compute the same. `upcycle`: experts for the
    feed-forward parts."""
    factor: int = 4
    """How many times the layers, or the width; 4 is the paper's advice for `stack`."""
    noise: float = 0.0
    """Random part mixed into the matrices of deepened models (section 4.4; the paper's 0.2 was
    slightly better than none)."""
    moe: MoeConfig | None = None
    """For `upcycle`: the experts."""
    seed: int = 1234
    """Of what is drawn."""


def grow(
    parents: Sequence[tuple[ModelConfig, Tensors]], growth: Growth
) -> tuple[ModelConfig, Iterator[Piece]]:
    """The grown model, and its tensors, which are read from the parents as they are taken.

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
    order = interpolated if growth.operator == "interpolate" else stacked
    sources = order(model.num_layers, growth.factor)
    silent = range(model.num_layers, len(sources)) if growth.operator == "zero" else ()
    return grown, deepen(base, sources, silent, growth.noise)


def grown_model(model: ModelConfig, growth: Growth) -> ModelConfig:
    """What `growth` makes of a finalized model."""
    if growth.operator == "upcycle":
        moe = growth.moe or MoeConfig()
        return replace(model, moe=replace(moe, ffn_hidden_size=model.ffn_hidden_size))
    if growth.operator == "width":
        return _wider(model, growth.factor)
    deeper = replace(model, num_layers=model.num_layers * growth.factor)
    return _weights_again(deeper, growth.factor)


def _weights_again(model: ModelConfig, factor: int) -> ModelConfig:
    """With the balance weights of each layer repeated as the layers are."""
    if model.moe is None or model.moe.balance_weights is None:
        return model
    return replace(
        model, moe=replace(model.moe, balance_weights=model.moe.balance_weights * factor)
    )


def _wider(model: ModelConfig, factor: int) -> ModelConfig:
    assert model.num_kv_heads is not None and model.ffn_hidden_size is not None
    moe = model.moe
    if moe is not None:
        assert moe.ffn_hidden_size is not None
        moe = replace(
            moe,
            ffn_hidden_size=factor * moe.ffn_hidden_size,
            shared_ffn_hidden_size=factor * moe.shared_ffn_hidden_size,
        )
    return replace(
        model,
        hidden_size=factor * model.hidden_size,
        num_heads=factor * model.num_heads,
        num_kv_heads=factor * model.num_kv_heads,
        ffn_hidden_size=factor * model.ffn_hidden_size,
        moe=moe,
    )


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
