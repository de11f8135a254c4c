"""The operators by which models grow, a record each; torch is imported when one is applied.

A new operator is a generator of pieces beside the others and a record here: the command line, the
model, the tensors, the moments and what a lineage says of it follow from the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from megascale.config import ModelConfig, MoeConfig
from megascale.errors import UserError
from megascale.growth.layer_orders import interpolated, stacked

if TYPE_CHECKING:
    from megascale.checkpoint.tensors import Piece, Tensors
    from megascale.growth.learn import Maps


@dataclass(frozen=True)
class Growth:
    """What to do to a model."""

    operator: str = "stack"
    """A name of `OPERATORS`."""
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
    """What becomes of the optimizer's moments: left behind, as in the paper, or grown too."""
    seed: int = 1234
    """Of what is drawn."""


@dataclass(frozen=True)
class Parents:
    """What a checkpoint grows from."""

    model: ModelConfig
    """The finalized model of all parents."""
    tensors: Sequence[Tensors]
    """The weights of each parent."""
    maps: Maps = field(default_factory=dict)
    """Those of `learn`, where they have been learned."""

    @property
    def base(self) -> Tensors:
        """The weights of the first parent."""
        return self.tensors[0]


Pieces = Callable[[Parents, ModelConfig, Growth], "Iterator[Piece]"]
"""The tensors of the grown model, of which the config is given, read as they are taken."""
LayerOrder = Callable[[int, int], list[int]]
"""Of a number of layers and a factor, the old layer that each new one copies."""
Moments = Callable[[ModelConfig, "Tensors", Growth, int], "Iterator[Piece]"]
"""A moment of the optimizer, the mean of gradients to a power, for the grown model: of the old
model, that moment of it, and the power."""


@dataclass(frozen=True)
class Operator:
    """One way to grow."""

    meaning: str
    """For `megascale grow --help`."""
    options: tuple[str, ...]
    """Options of `megascale grow` that have an effect, apart from those of all operators."""
    model: Callable[[ModelConfig, Growth], ModelConfig]
    """What becomes of a finalized model."""
    pieces: Pieces
    moments: Moments | None = None
    """None where no rule is known."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Options that must be given, and an example or a reason."""
    takes_several: bool = False
    """Whether it grows several checkpoints of one model into one."""
    detail: Callable[[Growth], str] = lambda growth: f"--factor {growth.factor}"
    """Its options as a user would type them."""


def _deeper(model: ModelConfig, growth: Growth, order: LayerOrder = stacked) -> ModelConfig:
    """More layers, each with the kind of attention of the layer that it is made from."""
    pattern = model.attention_pattern
    if pattern:
        sources = order(model.num_layers, growth.factor)
        pattern = tuple(model.attention_kind(layer + 1) for layer in sources)
    layers = model.num_layers * growth.factor
    deeper = replace(model, num_layers=layers, attention_pattern=pattern)
    if model.moe is None or model.moe.balance_weights is None:
        return deeper
    weights = model.moe.balance_weights * growth.factor  # repeated as the layers are
    return replace(deeper, moe=replace(model.moe, balance_weights=weights))


def _copies(order: LayerOrder, silent: bool = False) -> Pieces:
    """Layers in an order; with `silent` the new ones add nothing at first."""

    def pieces(parents: Parents, grown: ModelConfig, growth: Growth) -> Iterator[Piece]:
        from megascale.growth.depth import deepen

        old = parents.model.num_layers
        new = range(old, grown.num_layers) if silent else ()
        sources = order(old, growth.factor)
        return deepen(parents.base, sources, new, noise=growth.noise, seed=growth.seed)

    return pieces


def _copied_moments(order: LayerOrder, silent: bool = False) -> Moments:
    """Moments of those layers; zeros for new ones that add nothing at first."""

    def moments(model: ModelConfig, moment: Tensors, growth: Growth, power: int) -> Iterator[Piece]:
        from megascale.growth.depth import deepen

        old = model.num_layers
        new = range(old, old * growth.factor) if silent else ()
        return deepen(moment, order(old, growth.factor), new, silenced=("",))

    return moments


def _masked(model: ModelConfig, growth: Growth) -> ModelConfig:
    return replace(_deeper(model, growth), mask_tokens=growth.mask_tokens)


def _random_pieces(parents: Parents, grown: ModelConfig, growth: Growth) -> Iterator[Piece]:
    from megascale.growth.depth import add_random

    return add_random(parents.base, parents.model.num_layers, grown, growth.seed)


def _learned_pieces(parents: Parents, grown: ModelConfig, growth: Growth) -> Iterator[Piece]:
    from megascale.growth.learn import combined

    return combined(parents.base, growth.factor, parents.maps)


def _wider(model: ModelConfig, growth: Growth) -> ModelConfig:
    assert model.num_kv_heads is not None and model.ffn_hidden_size is not None
    factor, moe = growth.factor, model.moe
    if model.qk_norm_heads == "all":
        raise UserError("models with model.qk_norm_heads = all do not grow in width yet")
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


def _wider_pieces(parents: Parents, grown: ModelConfig, growth: Growth) -> Iterator[Piece]:
    from megascale.growth.width import widen

    return widen(parents.base, growth.factor, parents.model.tied_embeddings, growth.seed)


def _wider_moments(
    model: ModelConfig, moment: Tensors, growth: Growth, power: int
) -> Iterator[Piece]:
    from megascale.growth.width import widen_moment

    return widen_moment(moment, growth.factor, model.tied_embeddings, power)


def _resized(model: ModelConfig, growth: Growth) -> ModelConfig:
    old, new = model.vocab_size or 0, growth.vocab_size or 0
    if new <= old:
        raise UserError(
            f"--vocab {new} is not above the {old} ids that the model knows; a corpus with "
            "fewer needs no resize"
        )
    return replace(model, vocab_size=new)


def _resized_pieces(parents: Parents, grown: ModelConfig, growth: Growth) -> Iterator[Piece]:
    from megascale.growth.resize import resize

    old, new = parents.model.vocab_size or 0, grown.vocab_size or 0
    return resize(parents.base, old, new, growth.noise, growth.seed)


def _resized_moments(
    model: ModelConfig, moment: Tensors, growth: Growth, power: int
) -> Iterator[Piece]:
    from megascale.growth.resize import resize_moment

    return resize_moment(moment, model.vocab_size or 0, growth.vocab_size or 0)


def _with_experts(model: ModelConfig, growth: Growth) -> ModelConfig:
    moe = growth.moe or MoeConfig()
    return replace(model, moe=replace(moe, ffn_hidden_size=model.ffn_hidden_size))


def _upcycled_pieces(parents: Parents, grown: ModelConfig, growth: Growth) -> Iterator[Piece]:
    from megascale.growth.upcycle import check_branches, upcycle

    check_branches(parents.model, parents.tensors, growth.moe or MoeConfig())
    return upcycle(parents.tensors, grown, growth.seed)


def _expert_options(growth: Growth) -> str:
    moe = growth.moe or MoeConfig()
    attention = f" --attention-experts {moe.attention_experts}" * (moe.attention_experts > 1)
    return f"--experts {moe.num_experts} --top-k {moe.top_k}{attention}"


OPERATORS: Mapping[str, Operator] = {
    "stack": Operator(
        meaning="all layers again and again (G_stack)",
        options=("factor", "noise"),
        model=_deeper,
        pieces=_copies(stacked),
        moments=_copied_moments(stacked),
    ),
    "interpolate": Operator(
        meaning="each layer several times in a row",
        options=("factor", "noise"),
        model=partial(_deeper, order=interpolated),
        pieces=_copies(interpolated),
        moments=_copied_moments(interpolated),
    ),
    "zero": Operator(
        meaning="as stack, but new layers add nothing at first",
        options=("factor",),
        model=_deeper,
        pieces=_copies(stacked, silent=True),
        moments=_copied_moments(stacked, silent=True),
    ),
    "random": Operator(
        meaning="new layers with initial weights behind a mask that opens in training",
        options=("factor", "mask_tokens"),
        model=_masked,
        pieces=_random_pieces,
        moments=_copied_moments(stacked, silent=True),
        needs={"mask_tokens": "such as 1B"},
        detail=lambda growth: f"--factor {growth.factor} --mask-tokens {growth.mask_tokens}",
    ),
    "learn": Operator(
        meaning="each new layer a learned combination of all old ones (LiGO, over depth)",
        options=("factor", "steps"),
        model=_deeper,
        pieces=_learned_pieces,
        detail=lambda growth: f"--factor {growth.factor} --steps {growth.steps}",
    ),
    "width": Operator(
        meaning="more hidden units, heads and feed-forward units, and the same function",
        options=("factor",),
        model=_wider,
        pieces=_wider_pieces,
        moments=_wider_moments,
    ),
    "resize": Operator(
        meaning="rows for the ids of a larger vocabulary",
        options=("noise", "vocab"),
        model=_resized,
        pieces=_resized_pieces,
        moments=_resized_moments,
        needs={"vocab": "the ids of the larger vocabulary"},
        detail=lambda growth: f"--vocab {growth.vocab_size}",
    ),
    "upcycle": Operator(
        meaning="experts, copies of one checkpoint or from several branches of it",
        options=("experts", "top_k", "attention_experts"),
        model=_with_experts,
        pieces=_upcycled_pieces,
        takes_several=True,
        detail=_expert_options,
    ),
}
"""By the name that `megascale grow --operator` and `growth.operator` give."""


def grown_model(model: ModelConfig, growth: Growth) -> ModelConfig:
    """What `growth` makes of a finalized model. Raises UserError where it does not suit."""
    return OPERATORS[growth.operator].model(model, growth)
