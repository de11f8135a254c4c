"""Replay: what earlier runs have read becomes sources of a run that starts from them.

Compute-equivalent replay (arXiv 2403.08763, section 5.3): a fraction of every batch comes from
what was really read before, and the new data gives that much less.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megascale.checkpoint.load import read_manifest
from megascale.checkpoint.manifest import Position
from megascale.config import RunConfig, SeenConfig, SourceConfig, load_config, parse_config
from megascale.corpus.batches import Cursor
from megascale.corpus.describe import SourceInfo, describe, identity
from megascale.errors import UserError

PREFIX = "replay/"


def with_earlier_sources(config: RunConfig) -> RunConfig:
    """`config` with a source `replay/NAME` for everything that the runs behind it have read.

    Without a replay fraction they are evaluated only, and one that this run goes on to read, or
    whose data is gone, is left out. Raises UserError where data to replay is gone or has changed.
    """
    if config.start.checkpoint is None or _replayed(config):
        return config
    own = Path(config.run_dir) / "config.yaml"
    begun = load_config(own) if own.exists() else None
    if begun is not None and begun.start == config.start:
        earlier = _replayed(begun)
    else:
        earlier = _read_before(read_manifest(config.start.checkpoint).position, config)
    return replace(config, data=replace(config.data, sources={**config.data.sources, **earlier}))


def with_replay_blend(config: RunConfig) -> RunConfig:
    """A finalized `config` whose every blend gives replay its fraction, by tokens read before."""
    fraction, replayed = config.data.replay_fraction, _replayed(config)
    if not fraction or any(
        name in stage.blend for name in replayed for stage in config.data.stages
    ):
        return config
    if not replayed:
        raise UserError(
            f"data.replay_fraction = {fraction}: the checkpoint {config.start.checkpoint} has read "
            "nothing that could be replayed"
        )
    total = sum(_tokens(source) for source in replayed.values())
    old = {name: fraction * _tokens(source) / total for name, source in replayed.items()}
    stages = []
    for stage in config.data.stages:
        scale = (1 - fraction) / sum(stage.blend.values())
        new = {name: scale * share for name, share in stage.blend.items()}
        stages.append(replace(stage, blend=new | old))
    return replace(config, data=replace(config.data, stages=tuple(stages)))


def part_seen(info: SourceInfo, source: SourceConfig) -> SourceInfo:
    """What a source of replay holds, of what its corpus does."""
    if source.seen is None:
        return info
    tokens = min(source.seen.tokens, info.train_tokens)
    size = info.train_bytes
    if size is not None:
        size = round(size * tokens / max(1, info.train_tokens))
    return replace(info, train_tokens=tokens, train_bytes=size)


def _replayed(config: RunConfig) -> dict[str, SourceConfig]:
    return {name: one for name, one in config.data.sources.items() if one.seen is not None}


def _tokens(source: SourceConfig) -> int:
    assert source.seen is not None
    return source.seen.tokens


def _read_before(parent: Position, config: RunConfig) -> dict[str, SourceConfig]:
    """Sources of replay: what the parent has read, and what it has replayed."""
    if "data" not in parent.cursor:
        return {}
    old = parse_config(parent.config, where=str(config.start.checkpoint))
    read = Cursor.from_json(parent.cursor["data"]).sources
    found = _replayed(old)
    for name, source in old.data.sources.items():
        if source.seen is None and name in read:
            seen = SeenConfig(
                name=name,
                seed=old.seed,
                context_tokens=old.data.context_tokens,
                pieces=read[name].pieces,
                tokens=read[name].tokens,
            )
            found[f"{PREFIX}{name}"] = replace(source, seen=seen)
    return {name: one for name, one in found.items() if _usable(name, one, parent, config)}


def _usable(name: str, source: SourceConfig, parent: Position, config: RunConfig) -> bool:
    """Whether a source is there as it was; else an error where it is to be replayed."""
    assert source.seen is not None
    fraction, plain = config.data.replay_fraction, source.seen.name
    if not fraction and plain in config.data.sources:
        return False
    if fraction and source.seen.context_tokens > config.data.context_tokens:
        raise UserError(
            f"source '{plain}' was read in pieces of {source.seen.context_tokens} tokens; to "
            f"replay it, set data.context_tokens={source.seen.context_tokens} or above"
        )
    known = parent.cursor["sources"]  # of one that the parent replayed too, under its own name
    try:
        info = describe(source.path, source.heldout, source.vocab_size, source.eod_id)
        was, now = (known[name], part_seen(info, source)) if name in known else (known[plain], info)
        if was != identity(now):
            raise UserError(f"it held {was} when it was read and holds {identity(now)} now")
    except UserError as error:
        if fraction:
            raise UserError(f"replay of '{plain}', read from {source.path}: {error}") from None
        return False
    return True
