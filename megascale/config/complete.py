"""Configs without a corpus, such as those of models that come from elsewhere."""

from __future__ import annotations

from megascale.config.derive import finalize
from megascale.config.schema import DataConfig, RunConfig, SourceConfig


def complete(config: RunConfig) -> RunConfig:
    """A config that names no corpus, with everything derived. Raises UserError as finalize does."""
    data = DataConfig(
        sources={"none": SourceConfig(path="none")}, context_tokens=config.data.context_tokens
    )
    return finalize(RunConfig(model=config.model, data=data, train=config.train), {"none": 1}, 1)
