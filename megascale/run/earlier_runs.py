"""What runs behind a checkpoint have read: where one that starts from it goes on in the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from megascale.config import EarlierConfig, RunConfig, SourceConfig
from megascale.corpus.sources import SourceInfo, identity
from megascale.errors import UserError
from megascale.run.start import Start

PREFIX = "replay/"


def with_earlier(config: RunConfig, start: Start | None) -> RunConfig:
    """`config` with what the runs behind it have read of its sources, and what else they read.

    A source `replay/NAME` is added for everything that they have read. Without a replay fraction
    these are evaluated only, and one that this run goes on to read, or whose data is gone, is left
    out. Raises UserError where data to replay, or of which `eval.forgetting_alarm` is to warn, is
    gone or has changed.
    """
    if start is None:
        _refuse_written(config)
        return config
    known = start.read
    fixed = start.begun.data.sources if start.begun is not None else {}
    plain = {name: one for name, one in config.data.sources.items() if not one.replay}
    held = {name: _held(source) for name, source in plain.items()}
    sources = {}
    for name, source in plain.items():
        if name in fixed:
            place = fixed[name]
        else:
            place = _place(name, source, _known_as(name, held[name], known), config)
        sources[name] = replace(source, earlier=place.earlier, begin=place.begin)
    gone_on = {one.earlier.held for one in sources.values() if one.earlier is not None}
    others = {n: one for n, one in known.items() if _earlier(one).held not in gone_on}
    replays = {name: one for name, one in fixed.items() if one.replay}
    if (
        start.begun is None
        or config.data.replay_fraction
        or config.eval.forgetting_alarm is not None
    ):
        unread = {n: one for n, one in known.items() if _earlier(one).held not in held.values()}
        wanted = known if config.data.replay_fraction else unread
        replays |= _replays(wanted, {**start.replayed, **replays}, config)
    data = replace(config.data, sources=sources | replays, earlier=others)
    return replace(config, data=data)


def _earlier(source: SourceConfig) -> EarlierConfig:
    """What was read of a source of which something was."""
    assert source.earlier is not None
    return source.earlier


def _held(source: SourceConfig) -> str | None:
    """What a source holds; None where it is not there."""
    try:
        return identity(SourceInfo.of(source))
    except UserError:
        return None


def _refuse_written(config: RunConfig) -> None:
    for name, source in config.data.sources.items():
        if source.replay or source.earlier is not None or source.begin:
            raise UserError(
                f"data.sources.{name}: replay, earlier and begin are written by megascale in runs "
                "with start.checkpoint; leave them out"
            )


def _known_as(
    name: str, held: str | None, known: Mapping[str, SourceConfig]
) -> EarlierConfig | None:
    """What was read of a source before, by this or any other name."""
    for other in sorted(known, key=lambda other: other != name):
        if _earlier(known[other]).held == held:
            return known[other].earlier
    return None


def _place(
    name: str, source: SourceConfig, earlier: EarlierConfig | None, config: RunConfig
) -> SourceConfig:
    """A source from where this run goes on: in the same order if name, seed and context allow it,
    else in what is left."""
    if earlier is None:
        return replace(source, earlier=None, begin=0)
    *before, last = earlier.reads
    if config.start.data == "restart":
        earlier = replace(earlier, reads=(*earlier.reads, replace(last, pieces=0)))
        return replace(source, earlier=earlier, begin=0)
    order = (name, config.seed, config.data.context_tokens)
    if (last.name, last.seed, last.context_tokens) != order:
        return replace(source, earlier=earlier, begin=0)
    return replace(source, earlier=replace(earlier, reads=tuple(before)), begin=last.pieces)


def trouble(source: SourceConfig, earlier: EarlierConfig) -> str | None:
    """Why a source is not what was read of it earlier; None where it is."""
    try:
        now = identity(SourceInfo.of(source))
    except UserError as error:
        return str(error)
    if now != earlier.held:
        return f"it held {earlier.held} when it was read and holds {now} now"
    return None


def _replays(
    known: Mapping[str, SourceConfig], places: Mapping[str, SourceConfig], config: RunConfig
) -> Iterator[tuple[str, SourceConfig]]:
    """Sources of replay for all that is `known`, from their places where these are of the same."""
    fraction, context = config.data.replay_fraction, config.data.context_tokens
    for name, source in known.items():
        earlier = _earlier(source)
        longest = max(one.context_tokens for one in earlier.reads)
        if fraction and longest > context:
            raise UserError(
                f"source '{name}' was read in pieces of {longest} tokens; to replay it, set "
                f"data.context_tokens={longest} or above"
            )
        problem = trouble(source, earlier)
        if problem is not None and fraction:
            raise UserError(f"replay of '{name}', read from {source.path}: {problem}")
        if problem is not None and config.eval.forgetting_alarm is not None:
            raise UserError(
                f"eval.forgetting_alarm cannot watch '{name}', read from {source.path}: {problem}; "
                "bring the data back, or set eval.forgetting_alarm=null"
            )
        if problem is None:
            was = places.get(f"{PREFIX}{name}")
            begin = was.begin if was is not None and was.earlier == earlier else 0
            yield f"{PREFIX}{name}", replace(source, replay=True, begin=begin)


def unwatched(config: RunConfig) -> Iterator[str]:
    """Warnings about old data of a run with earlier ones that it does not evaluate."""
    for name, source in config.data.earlier.items():
        problem = trouble(source, _earlier(source))
        if problem is not None and f"{PREFIX}{name}" not in config.data.sources:
            yield (
                f"source '{name}', which earlier runs have read, is not evaluated, so that nobody "
                f"sees it forgotten: {problem}"
            )


def places_told(config: RunConfig) -> Iterator[str]:
    """Where a run that starts from a checkpoint begins to read, a line for each of its sources."""
    for name, source in config.data.sources.items():
        if source.replay:
            continue
        if source.earlier is not None and config.start.data == "restart":
            yield f"source '{name}' is read from its beginning"
        elif source.earlier is not None:
            tokens = source.earlier.tokens
            cut = "" if source.begin else "; what they left is cut and shuffled anew"
            yield f"source '{name}' goes on after the {tokens:,} tokens read before{cut}"
        elif name not in config.data.earlier:
            yield f"source '{name}' is new"
        else:
            reason = trouble(source, _earlier(config.data.earlier[name]))
            yield f"source '{name}' is read from its beginning: {reason}"
