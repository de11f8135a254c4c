"""A checkpoint's model on this one process, whatever layout wrote it: its logits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from megascale.checkpoint.load import Found, begin_from
from megascale.config import ModelConfig, RunConfig, TrainConfig, parse_config
from megascale.config.complete import complete
from megascale.errors import UserError
from megascale.mesh.packing import TokenSequence, pack
from megascale.model.build import build_model
from megascale.model.model import Model
from megascale.runtime import distributed
from megascale.runtime.environment import world_from_environment


@dataclass(frozen=True)
class OneRankModel:
    """A model that only answers."""

    config: RunConfig
    model: Model
    device: torch.device

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits after each token of every sequence, (tokens, vocab_size) in fp32."""
        arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
        batch = pack([TokenSequence(ids, ids) for ids in arrays], 0, 1, self.device)
        with torch.no_grad():
            output = self.model.chunks[0](
                input_ids=batch.tokens_T[None],
                position_ids=batch.segments.positions_T[None],
                attention_mask=None,
                packed_seq_params=batch.segments,
            )
        known = output[0, :, : self.config.model.vocab_size].float()
        return list(known.split([len(ids) for ids in arrays]))


@contextmanager
def open_model(found: Found, precision: Literal["fp32", "bf16"]) -> Iterator[OneRankModel]:
    """Build the model of a checkpoint and load its weights, in `precision` whatever they are in.

    Needs no optimizer state and no corpus. Raises UserError under torchrun with several ranks,
    and where weights and manifest disagree.
    """
    if world_from_environment()[1] != 1:
        raise UserError("this runs in one process; start it without torchrun")
    logging.getLogger("megatron").setLevel(logging.ERROR)  # there is no log file for its notices
    config = _config(found, precision)
    ranks = distributed.start(config)
    try:
        model = build_model(config, ranks)
        begin_from(found, model, None, False, ranks)
        model.eval()
        yield OneRankModel(config, model, ranks.device)
    finally:
        distributed.stop()


def run_config(found: Found) -> RunConfig:
    """The config that wrote a checkpoint, with its model complete."""
    config = parse_config(found.manifest.position.config, where=f"checkpoint {found.folder}")
    return replace(config, model=complete(config).model)


def _config(found: Found, precision: Literal["fp32", "bf16"]) -> RunConfig:
    config = run_config(found)
    model = for_one_rank(config.model)
    return complete(replace(config, model=model, train=TrainConfig(precision=precision)))


def for_one_rank(model: ModelConfig) -> ModelConfig:
    """A run's model, so that one process builds it on any device."""
    model = replace(model, implementation="local")  # the same arithmetic on every device
    if model.moe is None:
        return model
    # the other dispatcher pads every pass to one length
    return replace(model, moe=replace(model.moe, dispatcher="alltoall"))
