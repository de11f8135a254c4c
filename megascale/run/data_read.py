"""What the runs behind a checkpoint have read, and where they are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megascale.checkpoint.manifest import Position
from megascale.config import EarlierConfig, ReadConfig, RunConfig, SourceConfig
from megascale.config.schema import ORDER_VERSION
from megascale.corpus.batches import Cursor, SourceCursor


def read_by(position: Position, config: RunConfig) -> dict[str, SourceConfig]:
    """All sources that the run of a checkpoint and those behind it have read, and how far.

    `config` is that of the position.
    """
    if "data" not in position.cursor:
        return {}
    cursor = Cursor.from_json(position.cursor["data"])
    found = read_until(config, cursor, position.cursor["sources"])
    folder = Path(position.cursor.get("cwd", ""))
    return {name: _seen_from_here(source, folder) for name, source in found.items()}


def _seen_from_here(source: SourceConfig, folder: Path) -> SourceConfig:
    """A source whose path, where it leads nowhere, is relative to the `folder` of its run."""
    if Path(source.path).exists() or Path(f"{source.path}.idx").exists():
        return source
    heldout = source.heldout and str(folder / source.heldout)
    return replace(source, path=str(folder / source.path), heldout=heldout)


def read_until(
    config: RunConfig, cursor: Cursor, held: Mapping[str, str]
) -> dict[str, SourceConfig]:
    """The same of a run with a resolved config; `held` says what its sources hold."""
    found = dict(config.data.earlier)
    for name, source in config.data.sources.items():
        place = cursor.sources.get(name) or SourceCursor(source.begin)
        if source.replay:
            continue
        if not place.pieces:
            if source.earlier is not None:
                reads = source.earlier.reads
                known = replace(source.earlier, reads=reads if reads[-1].pieces else reads[:-1])
                found[name] = replace(source, earlier=known)
            continue
        before = source.earlier or EarlierConfig(reads=(), tokens=0, held=held.get(name, ""))
        own = ReadConfig(
            name=name,
            seed=config.seed,
            context_tokens=config.data.context_tokens,
            pieces=place.pieces,
            order=ORDER_VERSION,
        )
        earlier = replace(before, reads=(*before.reads, own), tokens=before.tokens + place.tokens)
        found[name] = replace(source, earlier=earlier, begin=0)
    return found


def places_of_replay(parent: Position, config: RunConfig) -> dict[str, SourceConfig]:
    """The parent's sources of replay, with `begin` where it came to in them."""
    if "data" not in parent.cursor:
        return {}
    cursor = Cursor.from_json(parent.cursor["data"])
    return {
        name: replace(one, begin=cursor.sources[name].pieces)
        for name, one in config.data.sources.items()
        if one.replay and name in cursor.sources
    }
