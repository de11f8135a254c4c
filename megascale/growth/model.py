"""What growth makes of a model, as options: without torch, so that a plan can say it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from megascale.config import ModelConfig, MoeConfig
from megascale.errors import UserError

Operator = Literal["stack", "interpolate", "zero", "random", "learn", "width", "resize", "upcycle"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)


@dataclass(frozen=True)
class Growth:
    """What to do to a model."""

    operator: Operator = "stack"
    """`stack`: layers 1 to l again and again (G_stack). `interpolate`: every layer several times
    in a row. `zero`: as `stack`, but the new layers add nothing at first. `random`: new layers
    with initial weights, which add nothing at first and open over `mask_tokens`. `learn`: as
    `stack`, then every layer a combination of all old ones that is learned. `width`: more
    hidden units, heads and feed-forward units that compute the same. `resize`: more ids.
    `upcycle`: experts for the feed-forward parts."""
    factor: int = 4
    """How many times the layers, or the width; 4 is the paper's advice for `stack`."""
    noise: float = 0.0
    """Random part mixed into the matrices of deepened models (section 4.4; the paper's 0.2 was
    slightly better than none), or into the new rows of `resize`."""
    vocab_size: int | None = None
    """For `resize`: ids of the larger vocabulary."""
    moe: MoeConfig | None = None
    """For `upcycle`: the experts."""
    mask_tokens: int | None = None
    """For `random`: tokens over which the new layers open."""
    steps: int = 100
    """For `learn`: steps of learning, each with a global batch."""
    optimizer: Literal["drop", "grow"] = "drop"
    """What becomes of AdamW's moments: they are left behind, as in the paper, or grow too."""
    seed: int = 1234
    """Of what is drawn."""


def grown_model(model: ModelConfig, growth: Growth) -> ModelConfig:
    """What `growth` makes of a finalized model."""
    if growth.operator == "upcycle":
        moe = growth.moe or MoeConfig()
        return replace(model, moe=replace(moe, ffn_hidden_size=model.ffn_hidden_size))
    if growth.operator == "resize":
        old, new = model.vocab_size or 0, growth.vocab_size or 0
        if new <= old:
            raise UserError(
                f"--vocab {new} is not above the {old} ids that the model knows; a corpus with "
                "fewer needs no resize"
            )
        return replace(model, vocab_size=new)
    if growth.operator == "width":
        return _wider(model, growth.factor)
    deeper = replace(model, num_layers=model.num_layers * growth.factor)
    if growth.operator == "random":
        deeper = replace(deeper, mask_tokens=growth.mask_tokens)
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
