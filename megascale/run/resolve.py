"""What a run is: its config and corpora, read once and completed, without any rank.

Without torch: this answers in under a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from megascale.config import RunConfig, finalize, load_config, validate
from megascale.corpus.batches import used_sources
from megascale.corpus.run_length import most_tokens
from megascale.corpus.sources import SourceInfo
from megascale.errors import UserError
from megascale.optim import steplaw
from megascale.planner import find_planner
from megascale.run.earlier_runs import with_earlier
from megascale.run.fim import require_usable_sentinels, with_fim
from megascale.run.growing import small_and_grown
from megascale.run.replay import part_seen, with_replay_blend
from megascale.run.same_tokenizer import require_same_tokenizer
from megascale.run.start import Start, require_model, start_of, with_rate_of_start


class ResolvedRun(NamedTuple):
    """What a run is made of: read once, and passed on."""

    config: RunConfig
    """Finalized."""
    sources: Mapping[str, SourceInfo]
    """The corpora of the config's sources."""
    start: Start | None
    """The checkpoint that it starts from, with what follows from it; None for new weights."""


def load_run(config_path: str | Path, overrides: Sequence[str] = ()) -> ResolvedRun:
    """Read a config, its corpora and the checkpoint that it starts from, and finalize it.

    Raises UserError as `read_run` does, for sources of different tokenizers, and for such that
    would be read more than `data.max_epochs` times.
    """
    run = read_run(config_path, overrides)
    require_same_tokenizer(run.config, run.sources)
    check_epochs(run.config, source_tokens(run.sources))
    return run


def read_run(config_path: str | Path, overrides: Sequence[str] = ()) -> ResolvedRun:
    """Like `load_run`, where sources need not go together.

    Raises UserError for what is wrong with the config or with a corpus, among it a model vocabulary
    smaller than a corpus's.
    """
    config = load_config(config_path, overrides)
    start = start_of(config)
    if start is not None:
        config = load_config(config_path, overrides, under={"model": start.model})
        config = replace(config, start=start.section)
    config = with_fim(steplaw.resolve(with_rate_of_start(config, start)))
    config = with_earlier(config, start)
    sources = {
        name: part_seen(SourceInfo.of(one), one) for name, one in config.data.sources.items()
    }
    tokens = source_tokens(sources)
    new = {name: tokens[name] for name, one in config.data.sources.items() if not one.replay}
    largest = max((info.vocab_size for info in sources.values()), default=1)
    config = with_replay_blend(finalize(config, new, largest))
    find_planner(config.planner.name)
    _check_vocabulary(config, sources)
    require_usable_sentinels(config, sources)
    if start is not None:
        require_model(config, start)
    if config.growth is not None:
        validate(small_and_grown(config)[1])
    return ResolvedRun(config, sources, start)


def source_tokens(sources: Mapping[str, SourceInfo]) -> dict[str, int]:
    """Training tokens of each source."""
    return {name: info.train_tokens for name, info in sources.items()}


def _check_vocabulary(config: RunConfig, sources: Mapping[str, SourceInfo]) -> None:
    known, start = config.model.vocab_size or 0, config.start.checkpoint
    for name, info in sources.items():
        if info.vocab_size > known and start is not None:
            raise UserError(
                f"source '{name}' has a vocabulary of {info.vocab_size} ids, the model of "
                f"{start} knows {known}; prepare the source with its tokenizer, or give it rows "
                f"for the new ids: megascale grow {quote(start)} --operator resize --vocab "
                f"{info.vocab_size} --out DIR, then start from DIR"
            )
        if info.vocab_size > known:
            raise UserError(
                f"model.vocab_size = {known} is below the vocabulary of {info.vocab_size} of "
                f"source '{name}'; set model.vocab_size={info.vocab_size} or leave it out"
            )


def check_epochs(config: RunConfig, tokens: Mapping[str, int]) -> None:
    """Raise UserError where a source of so many tokens may be read too often."""
    limit = config.data.max_epochs
    if limit is None:
        return
    most = most_tokens(config.data, config.train.tokens)
    if config.growth is not None:  # where the small model stops, a piece may be begun
        small = most_tokens(config.data, config.growth.at_tokens)
        piece = config.data.context_tokens - 1
        most = {name: count + small[name] + piece for name, count in most.items()}
    for name, epochs in epochs_read(config, most, tokens).items():
        if epochs > limit:
            earlier = config.data.sources[name].earlier
            before = ", with what earlier runs read," * (earlier is not None)
            raise UserError(
                f"source '{name}'{before} would be read up to {epochs:.4g} times, but "
                f"data.max_epochs = {limit}; set data.max_epochs={math.ceil(epochs)}, lower its "
                "share or train.tokens"
            )


def epochs_read(
    config: RunConfig, read: Mapping[str, int], tokens: Mapping[str, int]
) -> dict[str, float]:
    """Passes over each source where so much of it is `read`, the runs behind this one included."""
    epochs = {}
    for name in used_sources(config.data.stages):
        source, count = config.data.sources[name], read.get(name, 0)
        if source.earlier is not None and not source.replay:
            count += source.earlier.tokens
        epochs[name] = count / max(1, tokens[name])
    return epochs
