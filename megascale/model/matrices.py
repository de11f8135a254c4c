"""The weights of a rank one by one, as shapes, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megascale.config import Layout, ModelConfig

FUSED_NAME = "linear_fc1"
"""Weights of this name hold SwiGLU's two matrices, gate on top of up."""


@dataclass(frozen=True)
class Weight:
    """A parameter as one rank holds it."""

    shape: tuple[int, ...]
    fused: int = 1
    """Matrices on top of each other in it."""
    is_expert: bool = False
    """Held by every `expert`-th rank of the HDP axis, not by all."""


def weights(model: ModelConfig, layout: Layout, stage: int, vocab_rows: int) -> Iterator[Weight]:
    """The weights on one rank of pipeline stage `stage`, in no special order."""
    hidden, is_last = model.hidden_size, stage == layout.pipeline - 1
    for _ in range(model.num_layers // layout.pipeline):
        yield from _layer(model, layout)
    embedding = Weight((vocab_rows // layout.tensor, hidden))
    if stage == 0:
        yield embedding
    if is_last:
        yield Weight((hidden,))
        if stage != 0 or not model.tied_embeddings:
            yield embedding


def _layer(model: ModelConfig, layout: Layout) -> Iterator[Weight]:
    assert model.ffn_hidden_size  # it is finalized
    hidden, moe = model.hidden_size, model.moe
    for _ in range(1 if model.parallel_block else 2):
        yield Weight((hidden,))
    attentions = moe.attention_experts if moe else 1
    for _ in range(attentions):
        yield from _attention(model, layout)
    if attentions > 1:
        yield Weight((attentions, hidden))
    if moe is None:
        yield from _feed_forward(hidden, model.ffn_hidden_size // layout.tensor)
        return
    yield Weight((moe.num_experts, hidden))
    if moe.shared_gate:
        yield Weight((1, hidden))
    yield from _feed_forward(hidden, moe.shared_ffn_hidden_size // layout.tensor)
    for _ in range(moe.num_experts // layout.expert):
        yield from _feed_forward(hidden, (moe.ffn_hidden_size or 0) // layout.tensor, True)


def _attention(model: ModelConfig, layout: Layout) -> Iterator[Weight]:
    assert model.num_kv_heads and model.head_dim
    hidden, heads = model.hidden_size, model.num_heads
    rows = (heads + 2 * model.num_kv_heads) * model.head_dim // layout.tensor
    yield Weight((rows, hidden))
    if model.qkv_bias:
        yield Weight((rows,))
    yield Weight((hidden, heads * model.head_dim // layout.tensor))
    for count in (heads, model.num_kv_heads) if model.qk_norm else ():
        all_heads = count // layout.tensor if model.qk_norm_heads == "all" else 1
        yield Weight((all_heads * model.head_dim,))


def _feed_forward(hidden: int, inner: int, is_expert: bool = False) -> Iterator[Weight]:
    """SwiGLU's weights, none of inner size 0."""
    if inner:
        yield Weight((2 * inner, hidden), 2, is_expert)
        yield Weight((hidden, inner), 1, is_expert)
