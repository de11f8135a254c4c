"""The tensors of a GPT, which megatron-core's checkpoints and ours have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megascale.checkpoint.ranges import Shape
from megascale.config import ModelConfig
from megascale.convert.megatron.names import EMBEDDING, HEAD, LAYERS

FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model; layers are along its first axis, experts along the second."""

    key: str
    stack: Shape
    """Numbers of layers and experts, of the axes that it has."""
    shape: Shape
    """Of one layer or expert."""

    @property
    def size(self) -> Shape:
        """Its global shape."""
        return self.stack + self.shape

    def places(self) -> Iterator[Shape]:
        """The index of each of its boxes on the leading axes."""
        yield from product(*map(range, self.stack))


def tensors_of(model: ModelConfig) -> Iterator[Tensor]:
    """All tensors of a complete model, without padded rows of the vocabulary."""
    vocab, width = model.vocab_size or 0, model.hidden_size
    yield Tensor(EMBEDDING, (), (vocab, width))
    for name, shape in (_attention(model) | _feed_forward(model)).items():
        yield Tensor(LAYERS + name, (model.num_layers,), shape)
    if model.moe is not None:
        stack, inner = (model.num_layers, model.moe.num_experts), model.moe.ffn_hidden_size or 0
        for name, shape in _gated("mlp.experts.experts", width, inner).items():
            yield Tensor(LAYERS + name, stack, shape)
    yield Tensor(FINAL_NORM, (), (width,))
    if not model.tied_embeddings:
        yield Tensor(HEAD, (), (vocab, width))


def _attention(model: ModelConfig) -> dict[str, Shape]:
    """megatron-core keeps the queries of a group, its key and its value together, as we do."""
    size, groups, width = model.head_dim or 0, model.num_kv_heads or 0, model.hidden_size
    heads, part = model.num_heads * size, "self_attention"
    joined = heads + 2 * groups * size
    norms = {f"{part}.{one}_layernorm.weight": (size,) for one in "qk"}
    return {
        f"{part}.linear_qkv.layer_norm_weight": (width,),
        f"{part}.linear_qkv.weight": (joined, width),
        **({f"{part}.linear_qkv.bias": (joined,)} if model.qkv_bias else {}),
        **(norms if model.qk_norm else {}),
        f"{part}.linear_proj.weight": (width, heads),
        "mlp.linear_fc1.layer_norm_weight": (width,),
    }


def _feed_forward(model: ModelConfig) -> dict[str, Shape]:
    """What a layer has apart from its experts: a dense part, or a router and a shared expert."""
    width, moe = model.hidden_size, model.moe
    if moe is None:
        return _gated("mlp", width, model.ffn_hidden_size or 0)
    found: dict[str, Shape] = {"mlp.router.weight": (moe.num_experts, width)}
    if moe.shared_ffn_hidden_size:
        found |= _gated("mlp.shared_experts", width, moe.shared_ffn_hidden_size)
    if moe.shared_gate:
        found["mlp.shared_experts.gate_weight"] = (1, width)
    return found


def _gated(part: str, width: int, inner: int) -> dict[str, Shape]:
    return {
        f"{part}.linear_fc1.weight": (2 * inner, width),
        f"{part}.linear_fc2.weight": (width, inner),
    }
