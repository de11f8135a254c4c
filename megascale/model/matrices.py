"""The weights of a rank one by one, and which rank of the HDP axis keeps SOAP's state of each.

SOAP needs whole matrices, so its state is not cut into ranges but dealt out, a weight to a rank.
Without torch: the plan of a run counts with the same functions that the optimizer is built by.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megascale.config import Layout, ModelConfig, RunConfig

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

    def soap_bytes(self, max_dim: int, has_master: bool) -> int:
        """Bytes of SOAP's state and of the master copy, if any: 4 per element.

        Two moments, and for each side of a matrix, up to `max_dim`, an average and a basis.
        """
        elements = (3 if has_master else 2) * math.prod(self.shape)
        if len(self.shape) == 2:
            sides = (self.shape[0] // self.fused, self.shape[1])
            elements += self.fused * sum(2 * side * side for side in sides if side <= max_dim)
        return 4 * elements


def deal(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank that keeps each of `sizes`: the largest first, each to the rank with the least."""
    held = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, owners[index] = held[0]
        heapq.heapreplace(held, (load + sizes[index], owners[index]))
    return owners


def soap_bytes_per_rank(config: RunConfig, layout: Layout, stage: int, vocab_rows: int) -> int:
    """Bytes of SOAP's state and master weights on the fullest rank of a pipeline stage.

    `vocab_rows` are those of the padded embedding, all tensor ranks together.
    """
    is_dealt, has_master = config.optim.distributed_optimizer, config.train.precision == "bf16"
    held = list(weights(config.model, layout, stage, vocab_rows))
    loads = [0] * layout.hdp
    for is_expert, every in ((False, 1), (True, layout.expert)):
        mine = [weight for weight in held if weight.is_expert == is_expert]
        sizes = [weight.soap_bytes(config.optim.soap_max_dim, has_master) for weight in mine]
        shares = [0 if is_dealt else sum(sizes)] * (layout.hdp // every)
        if is_dealt:
            for owner, size in zip(deal(sizes, len(shares)), sizes, strict=True):
                shares[owner] += size
        loads = [load + shares[rank // every] for rank, load in enumerate(loads)]
    return max(loads)


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
    for _ in range(2 if model.qk_norm else 0):
        yield Weight((model.head_dim,))


def _feed_forward(hidden: int, inner: int, is_expert: bool = False) -> Iterator[Weight]:
    """SwiGLU's weights, none of inner size 0."""
    if inner:
        yield Weight((2 * inner, hidden), 2, is_expert)
        yield Weight((hidden, inner), 1, is_expert)
