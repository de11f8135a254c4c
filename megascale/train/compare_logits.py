"""Whether a model of `transformers` and a checkpoint of ours are the same function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megascale.checkpoint.load import Found
from megascale.checkpoint.storage import one_line
from megascale.errors import UserError
from megascale.train.one_rank import open_model, run_config

SEQUENCES, TOKENS = 2, 96


@dataclass(frozen=True)
class LogitsDifference:
    """How far the logits of two models are apart, both computed in fp32."""

    largest: float
    mean: float
    spread: float
    """Standard deviation of the logits."""

    @property
    def relative(self) -> float:
        """The largest difference over the spread."""
        return self.largest / self.spread if self.spread else float(self.largest > 0)

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.3g}, mean {self.mean:.3g}, largest over the "
            f"logits' standard deviation {self.relative:.3g}"
        )


def compare_logits(folder: Path, found: Found, dtype: torch.dtype) -> LogitsDifference:
    """Run both models, one after the other, on the same random tokens.

    `folder` is the Hugging Face model, whose weights are rounded to `dtype` first, as those of
    the checkpoint were. Raises UserError where `transformers` cannot load it.
    """
    vocabulary = run_config(found).model.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (SEQUENCES, TOKENS))
    theirs = _their_logits(folder, ids, dtype)
    with open_model(found, "fp32") as model:
        ours = torch.stack(model.logits([list(row) for row in ids])).cpu()
    apart = (ours.double() - theirs.double()).abs()
    return LogitsDifference(apart.max().item(), apart.mean().item(), theirs.double().std().item())


def require_close(difference: LogitsDifference, tolerance: float) -> None:
    """Raise UserError above a `tolerance` of the largest difference over the spread."""
    if not difference.relative <= tolerance:
        raise UserError(
            f"logits of transformers and of megascale differ: {difference}; that is above "
            f"--tolerance {tolerance:g}, so nothing was written"
        )


def _their_logits(folder: Path, ids: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """(sequences, tokens, vocab_size) in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # it raises many kinds
        raise UserError(f"transformers cannot load {folder}: {one_line(error)}") from None
    with torch.no_grad():
        logits: torch.Tensor = model.float().eval()(torch.from_numpy(ids)).logits
    return logits
