"""A Megatron checkpoint as one of ours, checked as a whole before anything is written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from megascale.convert.megatron.architecture import model_of
from megascale.convert.megatron.description import Description
from megascale.convert.megatron.names import Names
from megascale.convert.megatron.optimizer import AdamState, adam_state
from megascale.convert.megatron.source import Source
from megascale.convert.megatron.weights import Box, Reader, boxes_of, dtype_of
from megascale.errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far training was at the checkpoint; None: the checkpoint does not have it."""

    iteration: int | None
    samples: int | None

    @staticmethod
    def of(source: Source) -> Progress:
        """From Megatron-Bridge's train state, the common state or the arguments."""
        arguments = source.common.get("args")
        options = vars(arguments) if isinstance(arguments, Namespace) else {}
        iteration = _first(
            source.progress.get("step"), source.common.get("iteration"), options.get("iteration")
        )
        samples = _first(
            source.progress.get("consumed_train_samples"), options.get("consumed_train_samples")
        )
        return Progress(iteration, samples)


def _first(*values: Any) -> int | None:
    sound = (one for one in values if type(one) is int and one >= 0)
    return next(sound, None)


@dataclass(frozen=True)
class Foreign:
    """A Megatron checkpoint that can be imported."""

    source: Source
    names: Names
    model: ModelConfig
    description: Description
    boxes: list[Box]
    progress: Progress
    adam: AdamState | None
    context_tokens: int

    @staticmethod
    def open(
        path: Path,
        vocab_size: int,
        by_hand: Mapping[str, Any] | None = None,
        by_hand_path: str = "",
        keeps_optimizer: bool = True,
    ) -> Foreign:
        """Read all but the tensors' values, and check that the tensors fit the architecture.

        Raises UserError, in one line, for what cannot be imported.
        """
        source = Source.open(path)
        try:
            return _foreign(source, vocab_size, by_hand, by_hand_path, keeps_optimizer)
        except UserError as error:
            if str(source.folder) in str(error) or (by_hand_path and by_hand_path in str(error)):
                raise
            raise UserError(f"{source.folder}: {error}") from None

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds every weight exactly."""
        return dtype_of(self.names, self.boxes)

    @property
    def tokens(self) -> int:
        """Tokens of the consumed samples; 0 where the checkpoint does not have their number."""
        return (self.progress.samples or 0) * self.context_tokens

    @property
    def unknown(self) -> list[str]:
        """What the checkpoint does not have, and the value taken for it."""
        found = [f"{name} (taken: {value})" for name, value in self.description.assumed.items()]
        if self.progress.iteration is None:
            found.append("the iteration (taken: 0)")
        if self.progress.samples is None:
            found.append("consumed samples (taken: 0 tokens)")
        if self.adam is not None and self.adam.assumed_steps:
            found.append(f"the steps of AdamW (taken: {self.adam.steps}, the iteration)")
        return found

    def reader(self, dtype: torch.dtype) -> Reader:
        """Reads its tensors as weights of `dtype`."""
        return Reader(self.source.folder, self.source.index, dtype)

    def config(self, dtype: torch.dtype) -> RunConfig:
        """Of the checkpoint that an import makes."""
        return RunConfig(
            model=self.model,
            data=DataConfig(context_tokens=self.context_tokens),
            train=TrainConfig(precision="fp32" if dtype == torch.float32 else "bf16"),
        )


def _foreign(
    source: Source,
    vocab_size: int,
    by_hand: Mapping[str, Any] | None,
    by_hand_path: str,
    keeps_optimizer: bool,
) -> Foreign:
    names = Names(source.index)
    if vocab_size > names.rows:
        raise UserError(
            f"a vocabulary of {vocab_size:,} ids does not fit the {names.rows:,} rows of the "
            "embedding; give the --tokenizer or the --vocab-size that the model was trained with"
        )
    description = Description.of(source, by_hand, by_hand_path)
    model, progress = model_of(description, names, vocab_size), Progress.of(source)
    adam = adam_state(source, names, progress.iteration or 0) if keeps_optimizer else None
    boxes = boxes_of(model, names, adam is not None)
    context = description.number(
        "seq_length", "max_position_embeddings", default=DataConfig().context_tokens
    )
    return Foreign(source, names, model, description, boxes, progress, adam, context)
