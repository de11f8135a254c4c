"""Dense checkpoints into a mixture of experts.

One: sparse upcycling (arXiv 2212.05055), every expert a copy. Several branches of one seed:
experts from each (Branch-Train-MiX), and with attention experts BAM (arXiv 2408.08274); what is
no expert is averaged, and routers begin random. The weights of the chosen experts sum to 1, so
equal branches give the dense model's logits. (The weight of one alone is its probability.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megascale.checkpoint.tensors import Piece, Tensors
from megascale.config import ModelConfig, MoeConfig
from megascale.errors import UserError
from megascale.growth.tensor_names import FC1, FC2, LAYERS, is_layered
from megascale.model.initialise import named_generator

ATTENTION = f"{LAYERS}self_attention."
ATTENTION_WEIGHTS = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_proj.weight",
    "layernorm.weight",
)


def check_branches(model: ModelConfig, branches: Sequence[Tensors], moe: MoeConfig) -> None:
    """Raise UserError where branches of `model` cannot become these experts."""
    if model.moe is not None:
        raise UserError(f"{branches[0].found.folder} has experts already; upcycle a dense one")
    if model.parallel_block:
        raise UserError("a model with model.parallel_block cannot have experts")
    if model.norm_position == "after":
        raise UserError("a model with model.norm_position = after cannot have experts")
    if len(branches) > moe.num_experts:
        raise UserError(f"{len(branches)} branches do not fit {moe.num_experts} experts")
    if not 2 <= moe.top_k <= moe.num_experts:
        raise UserError(
            f"top-k {moe.top_k} must be from 2 to the {moe.num_experts} experts; one expert alone "
            "is weighted by its probability, which would shrink what the dense model says"
        )
    if moe.attention_experts % len(branches) and moe.attention_experts > 1:
        raise UserError(
            f"{moe.attention_experts} attention experts cannot come evenly from {len(branches)} "
            f"branches; {len(branches)} would"
        )


def upcycle(branches: Sequence[Tensors], model: ModelConfig, seed: int = 0) -> Iterator[Piece]:
    """The tensors of `model`, whose expert e comes from branch e modulo their number."""
    assert model.moe is not None
    for key, shape in branches[0].shapes.items():
        if key.startswith(LAYERS) and key.endswith((FC1, FC2)):
            yield from _experts(branches, key, shape, model.moe.num_experts)
        elif model.moe.attention_experts > 1 and _of_attention(key):
            for expert in range(model.moe.attention_experts):
                own = key.replace(ATTENTION, f"{ATTENTION}experts.{expert}.")
                yield from _copied([branches[expert % len(branches)]], key, own)
        else:
            yield from _copied(branches, key, key)
    yield from _routers(model, seed)


def _of_attention(key: str) -> bool:
    return key.startswith(ATTENTION) and key.endswith(ATTENTION_WEIGHTS)


def _experts(
    branches: Sequence[Tensors], key: str, shape: tuple[int, ...], num_experts: int
) -> Iterator[Piece]:
    own = key.replace("mlp.", "mlp.experts.experts.")
    for layer in range(shape[0]):
        dense = [branch.read(key, (layer,), (1,))[:, None] for branch in branches]
        for expert in range(num_experts):
            whole, offset = (shape[0], num_experts, *shape[1:]), (layer, expert, 0, 0)
            yield Piece(own, whole, offset, dense[expert % len(dense)])


def _copied(branches: Sequence[Tensors], key: str, own: str) -> Iterator[Piece]:
    """The mean over branches, a layer at a time."""
    shape = branches[0].shapes[key]
    for layer in range(shape[0]) if is_layered(key) else [None]:
        place = ((), None) if layer is None else ((layer,), (1,))
        read = [branch.read(key, *place) for branch in branches]
        total = sum((one.float() for one in read), torch.zeros(()))
        mean = total / len(read) if len(read) > 1 else read[0]
        yield Piece(own, shape, (layer or 0, *(0 for _ in shape[1:])), mean.to(read[0].dtype))


def _routers(model: ModelConfig, seed: int) -> Iterator[Piece]:
    moe, layers, hidden = model.moe, model.num_layers, model.hidden_size
    assert moe is not None
    routers = {f"{LAYERS}mlp.router.weight": moe.num_experts}
    if moe.attention_experts > 1:
        routers[f"{LAYERS}self_attention.router.weight"] = moe.attention_experts
    for key, experts in routers.items():
        drawn = torch.randn(layers, experts, hidden, generator=named_generator(key, seed))
        yield Piece.whole(key, drawn * model.init_std)
