"""Whether a model of `transformers` and a checkpoint of ours are the same function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascale.checkpoint.load import Found
from megascale.checkpoint.storage import one_line
from megascale.config import ModelConfig
from megascale.convert.huggingface.attention import FULL
from megascale.convert.huggingface.config import read_config
from megascale.convert.one_rank import open_model, run_config
from megascale.errors import UserError
from megascale.model.counts import count_parameters, padded_vocab_size
from megascale.runtime import distributed

SEQUENCES, TOKENS = 2, 96
MOST_POSITIONS = 512
"""Positions of a long sequence whose logits are compared: evenly spaced, the last included."""
MOST_OPERATIONS = 2e14
"""Multiplications and additions of one model's forward pass: minutes on the cores of a host."""
MOST_BYTES = 16 * 2**30
"""Of logits; and of attention scores on CUDA, where fp32 keeps them all."""
SCORE_COPIES = 4


@dataclass(frozen=True)
class LogitsDifference:
    """How far the logits of two models are apart, both computed in fp32."""

    largest: float
    mean: float
    spread: float
    """Standard deviation of the logits."""
    tokens: int
    """Length of the sequences."""
    beyond: Mapping[str, int]
    """What these sequences were too short for: what it is, and its length in tokens."""

    @property
    def relative(self) -> float:
        """The largest difference over the spread."""
        return self.largest / self.spread if self.spread else float(self.largest > 0)

    def __str__(self) -> str:
        text = (
            f"largest difference {self.largest:.3g}, mean {self.mean:.3g}, largest over the "
            f"logits' standard deviation {self.relative:.3g}, sequences of {self.tokens:,} tokens"
        )
        if not self.beyond:
            return text
        listed = " and ".join(f"{what} of {tokens:,}" for what, tokens in self.beyond.items())
        enough = with_margin(max(self.beyond.values()))
        return f"{text}; not checked beyond {listed} tokens, --check-tokens {enough} is enough"


def compare_logits(
    folder: Path, found: Found, dtype: torch.dtype, most_tokens: int | None = None
) -> LogitsDifference:
    """Run both models, one after the other, on the same random tokens.

    Sequences reach beyond every window and the context where scaling of rotary angles begins, up
    to `most_tokens`; None: as far as `affordable_tokens` goes.
    `folder` is the Hugging Face model, whose weights are rounded to `dtype` first, as those of
    the checkpoint were. Raises UserError where `transformers` cannot load it.
    """
    model = run_config(found).model
    limits = _limits(read_config(folder), model)
    wanted = max([TOKENS, *map(with_margin, limits.values())])
    most = most_tokens or max(
        TOKENS, affordable_tokens(model, distributed.choose_device("auto")[0])
    )
    tokens = min(wanted, most)
    shape = (SEQUENCES if tokens <= TOKENS else 1, tokens)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, shape)
    places = np.unique(np.linspace(0, tokens - 1, MOST_POSITIONS).round().astype(np.int64))
    theirs = _their_logits(folder, ids, places, dtype)
    with open_model(found, "fp32") as opened:
        logits = opened.logits([list(row) for row in ids])
        ours = torch.stack([row[places] for row in logits]).cpu()
    apart = (ours.double() - theirs.double()).abs()
    return LogitsDifference(
        largest=apart.max().item(),
        mean=apart.mean().item(),
        spread=theirs.double().std().item(),
        tokens=tokens,
        beyond={what: limit for what, limit in limits.items() if limit >= tokens},
    )


def _limits(theirs: Any, ours: ModelConfig) -> dict[str, int]:
    """Lengths in tokens beyond which either model may do something else than before."""
    scaling = ours.rope_scaling
    windows = (getattr(theirs, "sliding_window", None), ours.sliding_window)
    rope = theirs.rope_parameters
    contexts = (
        rope.get(FULL, rope).get("original_max_position_embeddings"),
        scaling.original_tokens if scaling is not None else None,
    )
    named = {"a sliding window": windows, "the context before scaling of rope": contexts}
    numbers = {what: [n for n in pair if isinstance(n, int)] for what, pair in named.items()}
    return {what: max(lengths) for what, lengths in numbers.items() if any(lengths)}


def with_margin(limit: int) -> int:
    """Tokens that show well what happens beyond `limit` tokens."""
    return limit + max(32, limit // 4)


def affordable_tokens(model: ModelConfig, device: str) -> int:
    """Length of a sequence whose check stays within the bounds of time and memory above."""
    operations = 2 * count_parameters(model).active
    logits_bytes = 4 * padded_vocab_size(model)
    tokens = min(MOST_OPERATIONS / operations, MOST_BYTES / logits_bytes)
    if device == "cuda":
        scores_bytes = SCORE_COPIES * 4 * model.num_heads
        tokens = min(tokens, math.sqrt(MOST_BYTES / scores_bytes))
    return int(tokens)


def require_close(difference: LogitsDifference, tolerance: float) -> None:
    """Raise UserError above a `tolerance` of the largest difference over the spread."""
    if not difference.relative <= tolerance:
        raise UserError(
            f"logits of transformers and of megascale differ: {difference}; that is above "
            f"--tolerance {tolerance:g}, so nothing was written"
        )


def _their_logits(
    folder: Path, ids: np.ndarray, places: np.ndarray, dtype: torch.dtype
) -> torch.Tensor:
    """(sequences, places, vocab_size) in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
        with torch.no_grad():
            logits: torch.Tensor = (
                model.float()
                .eval()(
                    torch.from_numpy(ids),
                    use_cache=False,
                    logits_to_keep=torch.from_numpy(places),
                )
                .logits
            )
    except Exception as error:  # it raises many kinds
        raise UserError(f"transformers cannot run {folder}: {one_line(error)}") from None
    return logits
