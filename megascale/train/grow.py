"""Growing checkpoints: what a grown one says of itself, and growth inside a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from megascale.checkpoint.load import Found
from megascale.checkpoint.manifest import Position
from megascale.checkpoint.tensors import Piece, Tensors, write_checkpoint
from megascale.config import ModelConfig, RunConfig, StartConfig, dump_config, parse_config
from megascale.corpus.batches import Cursor, num_steps
from megascale.errors import UserError
from megascale.growth.grow import Growth, grow, grown_model
from megascale.model.counts import count_parameters
from megascale.train.start import Origin, Parent


def write_grown(found: Sequence[Found], growth: Growth, out: Path) -> str:
    """Write the checkpoint that `growth` makes of others as the folder `out`; what was done.

    Raises UserError where the checkpoints do not suit, or `out` exists.
    """
    parents = [(_model_of(one), Tensors(one)) for one in found]
    model, pieces = grow(parents, growth)
    made_by = f"megascale grow --operator {growth.operator} {_detail(growth)}"
    after = count_parameters(model).total
    manifest = write_checkpoint(out, _shown(pieces, 4 * after), _position(found, model, made_by))
    before = count_parameters(parents[0][0]).total
    size = sum(file.bytes for file in manifest.files.values())
    return (
        f"{made_by}: {before:,} parameters become {after:,}, {parents[0][0].num_layers} layers "
        f"become {model.num_layers}; {size / 1e6:,.1f} MB in {out}"
    )


def small_and_grown(config: RunConfig) -> tuple[RunConfig, RunConfig, Growth]:
    """The two runs of a finalized config with `growth`: of the small model, of the grown one."""
    growth = config.growth
    assert growth is not None
    base = Path(f"{config.run_dir.rstrip('/')}-base")
    steps = num_steps(config.data, growth.at_tokens)
    small = replace(
        config,
        growth=None,
        run_dir=str(base),
        train=replace(config.train, stop_after_steps=steps),
        eval=replace(config.eval, sample_prompt=None),
    )
    what = Growth(growth.operator, growth.factor, growth.noise, seed=config.seed)
    grown = replace(
        config,
        growth=None,
        model=grown_model(config.model, what),
        start=StartConfig(checkpoint=str(base / "grown")),
    )
    return small, grown, what


def _detail(growth: Growth) -> str:
    if growth.operator != "upcycle" or growth.moe is None:
        return f"--factor {growth.factor}"
    return f"--experts {growth.moe.num_experts} --top-k {growth.moe.top_k}" + (
        f" --attention-experts {growth.moe.attention_experts}"
    ) * (growth.moe.attention_experts > 1)


def _model_of(found: Found) -> ModelConfig:
    """The model of a checkpoint. Raises UserError where it does not say."""
    try:
        return parse_config(found.manifest.position.config, where=str(found.folder)).model
    except UserError as error:
        raise UserError(f"the checkpoint does not say of which model it is: {error}") from None


def _position(found: Sequence[Found], model: ModelConfig, made_by: str) -> Position:
    """The position of a checkpoint made from others: their place in the data, no optimizer.

    Of a source that several have read, the furthest place counts.
    """
    first = found[0].manifest.position
    config = parse_config(first.config, where=str(found[0].folder))
    cursor: dict[str, Any] = {}
    for one in found:
        position = one.manifest.position
        if "data" in position.cursor:
            read = Cursor.from_json(position.cursor["data"])
            known = cursor.setdefault("data", read.to_json())["sources"]
            cursor["sources"] = position.cursor["sources"] | cursor.get("sources", {})
            for name, source in read.to_json()["sources"].items():
                known[name] = max(known.get(name, source), source, key=lambda s: s["pieces"])
    origin = Origin(made_by, tuple(Parent.of(one) for one in found))
    return replace(
        first,
        tokens_seen=sum(one.manifest.position.tokens_seen for one in found),
        config=dump_config(replace(config, model=model)),
        cursor=cursor | {"origin": origin.to_json()},
    )


def _shown(pieces: Iterable[Piece], bytes_all: int) -> Iterator[Piece]:
    """The pieces, with a line on a terminal that says how far they are."""
    began, done, shows = time.monotonic(), 0, sys.stderr.isatty()
    for one in pieces:
        yield one
        done += 4 * prod(one.tensor.shape)
        if shows:
            left_s = (time.monotonic() - began) * max(0, bytes_all - done) / done
            sys.stderr.write(f"\r\x1b[K{done / bytes_all:.0%}, about {left_s:.0f} s left")
    if shows:
        sys.stderr.write("\r\x1b[K")
