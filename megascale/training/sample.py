"""Text that the model writes, one token at a time; for a look, not for serving."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megascale.corpus.sources import SourceInfo
from megascale.mesh.packing import MicroBatch, TokenSequence, pack
from megascale.model.build import pack_multiple
from megascale.runtime.distributed import all_agree, broadcast_bytes
from megascale.runtime.first_rank import from_first_rank, on_first_rank
from megascale.training.step import Learner

if TYPE_CHECKING:
    from megascale.corpus.tokenizers import Tokenizer

TEMPERATURE = 0.7


def sample_text(
    learner: Learner, prompt: str, info: SourceInfo, count: int, stop: Callable[[], bool]
) -> str | None:
    """Continue `prompt` as `sample_tokens` does, on rank 0; None on other ranks.

    `info` is a source with a tokenizer. Only rank 0 reads the tokenizer; where that fails, every
    rank raises the error.
    """
    from megascale.corpus.tokenizers import load_tokenizer

    ranks, folder = learner.ranks, info.tokenizer
    assert folder is not None
    tokenizer = on_first_rank(ranks, lambda: load_tokenizer(folder))
    begin = from_first_rank(ranks, lambda: _encoded(tokenizer, prompt))
    drawn = sample_tokens(learner, json.loads(begin), count, info, stop)
    return None if tokenizer is None else tokenizer.decode(drawn)


def _encoded(tokenizer: Tokenizer | None, prompt: str) -> bytes:
    assert tokenizer is not None, "rank 0 has loaded it"
    return json.dumps([int(token) for token in tokenizer.encode(prompt)]).encode()


def sample_tokens(
    learner: Learner, prompt: list[int], count: int, info: SourceInfo, stop: Callable[[], bool]
) -> list[int]:
    """Continue `prompt` by up to `count` tokens, drawn at temperature 0.7 with the run's seed.

    The id that begins documents of `info` stands before the prompt. Ends early at its
    end-of-document id, and as soon as `stop` holds on any rank. Every rank takes part and returns
    the same tokens. Each token costs a whole forward pass over at most `context_tokens` tokens.
    """
    learner.model.eval()
    generator = torch.Generator().manual_seed(learner.config.seed)
    context, tokens = learner.config.data.context_tokens, [info.first_id, *prompt]
    with torch.no_grad():
        for _ in range(count):
            if not all_agree(not stop(), learner.ranks):
                break
            logits = _next_logits(learner, tokens[-context:], info.eod_id)
            drawn = _draw(logits, generator) if logits is not None else None
            last_rank = learner.ranks.world - 1
            token = int.from_bytes(broadcast_bytes(drawn, learner.ranks, last_rank), "little")
            if token == info.eod_id:
                break
            tokens.append(token)
    learner.model.train()
    return tokens[1 + len(prompt) :]


def _draw(logits: torch.Tensor, generator: torch.Generator) -> bytes:
    chances = torch.softmax(logits.float().cpu() / TEMPERATURE, dim=-1)
    return int(torch.multinomial(chances, 1, generator=generator)).to_bytes(8, "little")


def _next_logits(learner: Learner, tokens: list[int], pad_id: int) -> torch.Tensor | None:
    """Logits of the token after `tokens`, over the real vocabulary; None before the last stage."""
    ids = np.asarray(tokens, dtype=np.int64)
    device = learner.ranks.device
    multiple = pack_multiple(learner.config, device)
    batch = pack([TokenSequence(ids, ids)], pad_id, multiple, device)
    outputs = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iter([batch]),
        model=learner.model.chunks,
        num_microbatches=1,
        seq_length=multiple,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not learner.ranks.is_last_stage:
        return None
    whole: torch.Tensor = gather_from_tensor_model_parallel_region(outputs[0][len(tokens) - 1])
    return whole[: learner.config.model.vocab_size]


def _forward(data: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    logits = chunk(
        input_ids=batch.tokens_T[None],
        position_ids=batch.segments.positions_T[None],
        attention_mask=None,
        packed_seq_params=batch.segments,
    )
    return logits, lambda output, non_loss_data: output[0]
