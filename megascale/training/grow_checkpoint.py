"""Growing checkpoints, and what a grown one says of itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path

from megascale.checkpoint.folder import whole_or_not_at_all
from megascale.checkpoint.load import Found
from megascale.checkpoint.manifest import Position
from megascale.checkpoint.tensors import Piece, Tensors, fill_checkpoint
from megascale.config import (
    ModelConfig,
    SourceConfig,
    dump_config,
    parse_config,
)
from megascale.convert.huggingface.tokenizer_folder import copy_tokenizer
from megascale.corpus.batches import Cursor
from megascale.corpus.sources import TOKENIZER_FOLDER
from megascale.errors import UserError
from megascale.growth.grow import grow, grow_moments
from megascale.growth.operators import OPERATORS, Growth
from megascale.model.counts import count_parameters
from megascale.run.data_read import read_by
from megascale.run.growing import command_of
from megascale.run.origin import Origin, Parent, keep_of_import, require_relatives
from megascale.run.start import RATE_TOKENS
from megascale.runtime.heartbeat import pulse
from megascale.training.learn_growth import Learned, learn_maps


def write_grown(found: Sequence[Found], growth: Growth, out: Path) -> str:
    """Write the checkpoint that `growth` makes of others as the folder `out`; what was done.

    Raises UserError where the checkpoints do not suit, or `out` exists.
    """
    if OPERATORS[growth.operator].takes_several:
        require_relatives(found)
    parents = [(_model_of(one), Tensors(one)) for one in found]
    model, pieces = grow(parents, growth)
    made_by = command_of(growth)
    after, position = count_parameters(model).total, _position(found, model, made_by)
    if growth.operator == "learn" and growth.steps:
        learned = learn_maps(found[0], model, growth.factor, growth.steps)
        pieces = grow(parents, growth, learned.maps)[1]
        position = _after(position, learned)
        made_by += f", loss {learned.losses[0]:.4f} in the first step and {learned.losses[-1]:.4f} "
        made_by += "in the last"
    steps, times = 0, 1
    if growth.optimizer == "grow":
        steps, times = found[0].manifest.optimizer_steps, 3
        pieces = chain(pieces, grow_moments(*parents[0], growth))
    with whole_or_not_at_all(out) as unfinished:
        shown = _shown(pieces, 4 * times * after)
        manifest = fill_checkpoint(unfinished, shown, position, steps)
        tokenizer = found[0].folder / TOKENIZER_FOLDER
        if tokenizer.is_dir() and growth.operator != "resize":
            copy_tokenizer(tokenizer, unfinished / TOKENIZER_FOLDER)
        keep_of_import(found[0], unfinished)
    before = count_parameters(parents[0][0]).total
    size = sum(file.bytes for file in manifest.files.values())
    layers = f", {parents[0][0].num_layers} layers become {model.num_layers}"
    return (
        f"{made_by}: {before:,} parameters become {after:,}"
        f"{layers * (parents[0][0].num_layers != model.num_layers)}; {size / 1e6:,.1f} MB in {out}"
    )


def _model_of(found: Found) -> ModelConfig:
    """The model of a checkpoint. Raises UserError where it does not say."""
    try:
        return parse_config(found.manifest.position.config, where=str(found.folder)).model
    except UserError as error:
        raise UserError(f"the checkpoint does not say of which model it is: {error}") from None


def _position(found: Sequence[Found], model: ModelConfig, made_by: str) -> Position:
    """The position of a checkpoint made from others: their place in the data, no optimizer.

    Of a source that several have read, the one that has read most of it counts.
    """
    first = found[0].manifest.position
    config = parse_config(first.config, where=str(found[0].folder))
    cursor = {key: first.cursor[key] for key in ("data", "sources") if key in first.cursor}
    reads: dict[str, SourceConfig] = {}
    for one in found if len(found) > 1 else ():
        position = one.manifest.position
        own = parse_config(position.config, where=str(one.folder))
        for name, source in read_by(position, own).items():
            reads[name] = max(reads.get(name, source), source, key=_tokens_read)
    if reads:
        plain = {
            name: replace(source, earlier=None, begin=0)
            for name, source in config.data.sources.items()
            if not source.replay
        }
        config = replace(config, data=replace(config.data, sources=plain, earlier=reads))
        cursor = {"data": Cursor().to_json(), "sources": {}}
    origin = Origin(made_by, tuple(Parent.of(one) for one in found))
    of_rate = first.cursor.get(RATE_TOKENS, first.tokens_seen)
    return replace(
        first,
        tokens_seen=sum(one.manifest.position.tokens_seen for one in found),
        config=dump_config(replace(config, model=model)),
        cursor=cursor | {"origin": origin.to_json(), RATE_TOKENS: of_rate},
    )


def _tokens_read(source: SourceConfig) -> int:
    return source.earlier.tokens if source.earlier is not None else 0


def _after(position: Position, learned: Learned) -> Position:
    """With what the map has learned from counted as read."""
    was = Cursor.from_json(position.cursor["data"])
    tokens = learned.cursor.tokens_seen - was.tokens_seen
    return replace(
        position,
        tokens_seen=position.tokens_seen + tokens,
        cursor={**position.cursor, "data": learned.cursor.to_json()},
    )


def _shown(pieces: Iterable[Piece], bytes_all: int) -> Iterator[Piece]:
    """The pieces, each marked, with a line on a terminal that says how far they are."""
    began, done, shows = time.monotonic(), 0, sys.stderr.isatty()
    for one in pieces:
        pulse.mark()
        yield one
        done += 4 * prod(one.tensor.shape)
        if shows:
            left_s = (time.monotonic() - began) * max(0, bytes_all - done) / done
            sys.stderr.write(f"\r\x1b[K{done / bytes_all:.0%}, about {left_s:.0f} s left")
    if shows:
        sys.stderr.write("\r\x1b[K")
