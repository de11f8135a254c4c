"""Rows of the embedding and the output head that belong to no id.

They pad the vocabulary to a multiple that suits matrix units and tensor ranks. In every softmax
they have probability and gradient 0, and no checkpoint holds them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from megascale.model.gpt import Gpt
from megascale.model.linear_cross_entropy import VocabularyPart

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Global names of the weights with a row for each id."""
CUDA_MULTIPLE = 64
"""Of logits on one CUDA rank: 128 bytes in bf16, without which matrix products are slow."""


def exclude_padding(model: Gpt, vocab_size: int, device: torch.device) -> None:
    """Take the padded rows of `model`, as this rank holds it, out of its logits.

    Without tensor parallelism they are left out of the product. Tensor ranks need logits of one
    shape, so there, and where CUDA wants a multiple, the logits of padded rows are -inf.
    """
    for weight in _vocabulary_weights(model):
        weight.num_ids = vocab_size
    if not model.post_process:
        return
    head, tensor = model.output_layer, parallel_state.get_tensor_model_parallel_world_size()
    held = rows = head.output_size_per_partition
    if tensor == 1:
        multiple = CUDA_MULTIPLE if device.type == "cuda" else 1
        rows = min(held, math.ceil(vocab_size / multiple) * multiple)
    if rows < held:
        head.output_size_per_partition = rows  # what it checks a given weight against
        head.register_forward_pre_hook(partial(_cut_weight, rows=rows), with_kwargs=True)
    first = parallel_state.get_tensor_model_parallel_rank() * rows
    known = ids_among(rows, first, vocab_size)
    group = parallel_state.get_tensor_model_parallel_group() if tensor > 1 else None
    model.vocabulary = VocabularyPart(rows, known, first, group)
    if known < rows:
        head.register_forward_hook(partial(_mask_logits, known=known))


def ids_among(rows: int, first: int, vocab_size: int) -> int:
    """How many of `rows` rows from row `first` on belong to an id."""
    return min(max(vocab_size - first, 0), rows)


def _vocabulary_weights(model: Gpt) -> list[Any]:
    """The embedding and the head where this rank has them. A tied head has no weight of its own,
    but for the copy on the last of several pipeline stages."""
    embedding = [model.embedding.word_embeddings.weight] if model.pre_process else []
    head = model.output_layer.weight if model.post_process else None
    return embedding if head is None else [*embedding, head]


def _cut_weight(
    head: Any, args: tuple[Any, ...], options: dict[str, Any], rows: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give `head` its first `rows` rows, or those of the tied embedding, as its weight."""
    tied = options.get("weight")
    weight = head.weight if tied is None else tied
    return args, {**options, "weight": weight[:rows]}


def _mask_logits(_head: Any, _args: Any, output: tuple[torch.Tensor, Any], known: int) -> Any:
    logits, bias = output
    return _Masked.apply(logits, known), bias


class _Masked(torch.autograd.Function):
    """Logits (..., rows), in place, with -inf after the first `known`.

    A softmax gives these a gradient of exactly 0, so the backward pass needs no mask, and no copy.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, known: int) -> torch.Tensor:  # type: ignore[override]
        """See the class."""
        ctx.mark_dirty(logits)
        logits[..., known:] = -math.inf
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """The gradient as it is."""
        return gradient, None
