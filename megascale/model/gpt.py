"""megatron-core's GPT, with a summed loss that never holds the logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megascale.model.linear_cross_entropy import VocabularyPart, linear_cross_entropy


class Gpt(GPTModel):  # type: ignore[misc]
    """On the last pipeline stage, the arguments of `forward` decide what it returns.

    With `labels` and `loss_mask`: the summed loss of the tokens that count, a scalar, by
    `linear_cross_entropy`. With `labels` alone: the loss of each token, from all logits, by
    megatron-core. With neither: logits.
    """

    vocabulary: VocabularyPart
    """What this rank computes of the logits. Set by `vocabulary.exclude_padding`."""

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if self.post_process and labels is not None and loss_mask is not None:
            return self._loss_sum(hidden_states, labels, loss_mask)
        output: torch.Tensor = super()._postprocess(
            hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **options
        )
        return output

    def _loss_sum(
        self, hidden: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (T, B, D), of this tensor rank under sequence parallelism; (B, T) twice."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        elif self.vocabulary.group is not None:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            labels.T.flatten(),
            loss_mask.T.flatten(),
            self.vocabulary,
        )
