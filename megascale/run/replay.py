"""Replay: what earlier runs have read becomes a part of every batch.

Compute-equivalent replay (arXiv 2403.08763, section 5.3): a fraction of every batch comes from
what was really read before, and the new data gives that much less.
"""

from __future__ import annotations

from dataclasses import replace
from math import isclose

from megascale.config import RunConfig, SourceConfig
from megascale.corpus.sources import SourceInfo
from megascale.errors import UserError


def with_replay_blend(config: RunConfig) -> RunConfig:
    """A finalized `config` whose every blend gives replay its fraction, by tokens read before."""
    fraction, replayed = config.data.replay_fraction, _replayed(config)
    if not fraction:
        return config
    if not replayed:
        raise UserError(
            f"data.replay_fraction = {fraction}: the checkpoint {config.start.checkpoint} has read "
            "nothing that could be replayed; give text like what it has learned from a share of "
            "data.stages instead"
        )
    if any(name in stage.blend for name in replayed for stage in config.data.stages):
        _require_fraction(config, fraction, replayed)
        return config
    total = sum(_tokens(source) for source in replayed.values())
    old = {name: fraction * _tokens(source) / total for name, source in replayed.items()}
    stages = []
    for stage in config.data.stages:
        scale = (1 - fraction) / sum(stage.blend.values())
        new = {name: scale * share for name, share in stage.blend.items()}
        stages.append(replace(stage, blend=new | old))
    return replace(config, data=replace(config.data, stages=tuple(stages)))


def _require_fraction(
    config: RunConfig, fraction: float, replayed: dict[str, SourceConfig]
) -> None:
    """Raise UserError where blends that name sources of replay give them another share."""
    for index, stage in enumerate(config.data.stages):
        given = sum(stage.blend.get(name, 0) for name in replayed) / sum(stage.blend.values())
        if not isclose(given, fraction, rel_tol=1e-6):
            raise UserError(
                f"data.stages[{index}].blend gives {', '.join(replayed)} {given:.4g} of the tokens "
                f"and data.replay_fraction is {fraction:g}; leave one of them out"
            )


def part_seen(info: SourceInfo, source: SourceConfig) -> SourceInfo:
    """What a source of replay holds, of what its corpus does."""
    if not source.replay:
        return info
    tokens = min(_tokens(source), info.train_tokens)
    size = info.train_bytes
    if size is not None:
        size = round(size * tokens / max(1, info.train_tokens))
    return replace(info, train_tokens=tokens, train_bytes=size)


def _replayed(config: RunConfig) -> dict[str, SourceConfig]:
    return {name: one for name, one in config.data.sources.items() if one.replay}


def _tokens(source: SourceConfig) -> int:
    assert source.earlier is not None
    return source.earlier.tokens
