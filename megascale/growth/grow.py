"""From checkpoints and an operator to a larger checkpoint: its model and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from megascale.checkpoint.read import ROUTER_STATE
from megascale.checkpoint.tensors import Piece, Tensors, moment_key
from megascale.config import ModelConfig
from megascale.config.optimizers import OPTIMIZERS, titles_of_growable
from megascale.errors import UserError
from megascale.growth.learn import Maps
from megascale.growth.operators import OPERATORS, Growth, Parents
from megascale.model.initialise import CLOSED_TOKENS


def grow(
    parents: Sequence[tuple[ModelConfig, Tensors]], growth: Growth, maps: Maps | None = None
) -> tuple[ModelConfig, Iterator[Piece]]:
    """The grown model, and its tensors, which are read from the parents as they are taken.

    `maps` are those of `learn`, where they have been learned.
    Raises UserError where the parents do not suit the operator.
    """
    operator, model = OPERATORS[growth.operator], parents[0][0]
    if len(parents) > 1 and not operator.takes_several:
        raise UserError(f"operator {growth.operator} grows one checkpoint, not {len(parents)}")
    for other, tensors in parents:
        if other != model:
            raise UserError(
                f"{tensors.found.folder} is not of the same model as {parents[0][1].found.folder}; "
                "experts come from branches of one model"
            )
    grown = operator.model(model, growth)
    from_ = Parents(model, [tensors for _, tensors in parents], maps or {})
    return grown, operator.pieces(from_, grown, growth)


def grow_moments(model: ModelConfig, checkpoint: Tensors, growth: Growth) -> Iterator[Piece]:
    """The optimizer's moments for the grown model, which begins with more of them than zeros.

    A copied layer has the moments of the layer that it copies, a new one that adds nothing at first
    has zeros. A wider model has those that its own gradients would have given, were no noise added
    (`widen_moment`). Raises UserError where the checkpoint has none, or no rule is known.
    """
    moments = OPERATORS[growth.operator].moments
    if moments is None:
        raise UserError(
            f"--optimizer grow: there is no rule for moments under --operator {growth.operator}; "
            "leave them behind with --optimizer drop"
        )
    for name, power in _means(checkpoint).items():
        moment = Tensors(checkpoint.found, name)
        for piece in moments(model, moment, growth, power):
            yield replace(piece, key=moment_key(name, piece.key))


def _means(checkpoint: Tensors) -> Mapping[str, int]:
    """The moments that can grow, each the mean of the gradients to this power."""
    names, trained = checkpoint.state_names, _trained(checkpoint)
    means = next((one.means for one in OPTIMIZERS.values() if one.means.keys() == names), {})
    if not means or any(Tensors(checkpoint.found, n).shapes.keys() != trained for n in means):
        raise UserError(
            f"checkpoint {checkpoint.found.folder} holds no moments of {titles_of_growable()} that "
            "could grow; leave them behind with --optimizer drop"
        )
    return means


def _trained(checkpoint: Tensors) -> set[str]:
    """Keys of the weights, without the counts that layers and routers keep."""
    return {key for key in checkpoint.shapes if not key.endswith((*ROUTER_STATE, CLOSED_TOKENS))}
