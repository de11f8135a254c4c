"""A run whose corpora need not be there: its lengths are drawn, its tokens are given as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megascale.arrays import Integers
from megascale.config import RunConfig, SourceConfig, finalize, load_config, validate
from megascale.corpus.batches import GlobalBatch
from megascale.corpus.run_length import RunLength, most_tokens
from megascale.errors import MissingInput, UserError, did_you_mean
from megascale.optim import steplaw
from megascale.planner import find_planner
from megascale.run.growing import small_and_grown
from megascale.run.resolve import ResolvedRun, check_epochs, epochs_read, load_run
from megascale.run.start import start_of, with_rate_of_start
from megascale.simulate.lengths import (
    DISTRIBUTIONS,
    LONGEST,
    draw_lengths,
    given_documents,
    sample_pieces,
)

POOL = 2**16
"""Documents of a named distribution from whose pieces a batch is drawn."""
ALONE = "documents"
"""Name of the source of a config that has none."""


class DrawnRun(NamedTuple):
    """A run, as far as it can be known without its corpora."""

    config: RunConfig
    """Finalized."""
    batch: GlobalBatch
    """Drawn; it stands for all steps."""
    lengths: str
    """What it was drawn from, as on the command line."""
    tokens: Mapping[str, int]
    """Of the sources, as far as they were given."""
    missing_start: str | None
    """A `start.checkpoint` that is not there either."""

    def batches(self) -> Iterator[GlobalBatch]:
        """Batches for all steps, each drawn anew; the first one is `batch`."""
        documents = _documents(self.lengths, self.config.seed)
        return (_draw(self.config, documents, step) for step in count())

    @property
    def length(self) -> RunLength:
        """How long the run is, if all steps are like the batch."""
        tokens, step_tokens = self.config.train.tokens, self.batch.num_tokens
        steps = -(-tokens // step_tokens)
        return RunLength(
            steps=np.array([0.0, steps]),
            tokens=np.array([0.0, steps * step_tokens]),
            stages=tuple(range(len(self.config.data.stages))),
            read={},
            end=None,
        )

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source whose tokens were given, to within a batch and a piece."""
        if not self.tokens:
            return {}
        read = most_tokens(self.config.data, self.config.train.tokens)
        return epochs_read(self.config, read, self.tokens)


def load_drawn_run(
    config_path: str | Path,
    overrides: Sequence[str],
    lengths: str,
    source_tokens: Mapping[str, int],
) -> DrawnRun:
    """Read a config without its corpora, and draw a batch from what `lengths` names.

    `source_tokens` are the tokens of the sources; without them all sources count alike in a config
    that has no blend. A `start.checkpoint` is read where it is there; what it has read is not
    replayed. Raises UserError for what is wrong with the config or with either of these.
    """
    config = load_config(config_path, overrides)
    missing = _missing_start(config)
    if config.start.checkpoint is not None and missing is None:
        start = start_of(config)
        under = {} if start is None else {"model": start.model}
        config = load_config(config_path, overrides, under=under)
        config = with_rate_of_start(config, start)
    config = steplaw.resolve(config)
    if not config.data.sources:
        sources = {ALONE: SourceConfig(path=lengths)}
        config = replace(config, data=replace(config.data, sources=sources))
    tokens = _tokens(config, source_tokens)
    if config.model.vocab_size is None:
        raise UserError("--lengths: no corpus says the vocabulary; set model.vocab_size=128256")
    config = finalize(config, tokens, 1)
    find_planner(config.planner.name)
    if config.growth is not None:
        validate(small_and_grown(config)[1])
    if source_tokens:
        check_epochs(config, tokens)
    context, most = config.data.context_tokens, np.iinfo(np.int32).max
    if context > most:
        raise UserError(f"data.context_tokens = {context} must be at most {most}")
    batch = _draw(config, _documents(lengths, config.seed), 0)
    return DrawnRun(config, batch, lengths, dict(source_tokens), missing)


def _missing_start(config: RunConfig) -> str | None:
    checkpoint = config.start.checkpoint
    return None if checkpoint is None or Path(checkpoint).exists() else checkpoint


def _tokens(config: RunConfig, given: Mapping[str, int]) -> dict[str, int]:
    """Tokens of each source: as given, or all alike."""
    names = config.data.sources
    for name in given:
        if name not in names:
            raise UserError(
                f"--source-tokens {name}: no source of the config, which has {', '.join(names)}"
            )
    missing = [name for name in names if name not in given]
    if given and missing:
        raise UserError(f"--source-tokens: give {missing[0]}=TOKENS too, or leave all out")
    return {name: given.get(name, 1) for name in names}


def _draw(config: RunConfig, documents: Integers, step: int) -> GlobalBatch:
    """A batch of pieces of `documents`, another one for each step."""
    data, seed = config.data, config.seed + step
    assert not isinstance(data.global_batch_tokens, str), "steplaw.resolve has put a number there"
    drawn = sample_pieces(documents, data.global_batch_tokens, data.context_tokens, seed)
    return GlobalBatch(
        step=step,
        source=np.zeros(len(drawn), np.int16),
        document=np.arange(len(drawn)),
        start=np.zeros(len(drawn), np.int64),
        length=drawn.astype(np.int32),
    )


def load_read_run(path: str | Path, overrides: Sequence[str]) -> ResolvedRun:
    """`load_run` for a plan. Where an input is missing, the error says how to do without."""
    try:
        return load_run(path, overrides)
    except MissingInput as error:
        raise MissingInput(f"{error}; or plan without it, with --lengths web") from None


def _documents(lengths: str, seed: int) -> Integers:
    given = given_documents(lengths, "--lengths ")
    if given is not None:
        if not given.size:
            raise UserError(f"--lengths {lengths}: has no document")
        return given
    if lengths not in DISTRIBUTIONS:
        raise UserError(
            f"--lengths {lengths}: no such file{did_you_mean(lengths, DISTRIBUTIONS)}; give one, "
            f"corpus:FOLDER, or one of {', '.join(DISTRIBUTIONS)}"
        )
    return draw_lengths(lengths, None, LONGEST, seed, POOL)
