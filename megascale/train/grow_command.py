"""`megascale grow`: a larger model's checkpoint from the checkpoints of smaller ones."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.config import ModelConfig, MoeConfig, dump_config, parse_config
from megascale.config.load import whole_number
from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.checkpoint.load import Found
    from megascale.checkpoint.tensors import Piece
    from megascale.growth.grow import Growth


def add_grow_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale grow`."""
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="RUN_OR_CHECKPOINT", help="run_dir or checkpoint folder")
    add("--out", required=True, metavar="DIR", help="folder of the new checkpoint")
    add(
        "--operator",
        default="stack",
        metavar="{stack,interpolate,zero,width,upcycle}",
        help="stack: all layers again and again (default); interpolate: each layer several times; "
        "zero: as stack, but new layers add nothing at first; width: wider, and the same function; "
        "upcycle: experts, copies of one checkpoint or from several branches of it",
    )
    add("--factor", default="4", metavar="G", help="times the layers, or the width; default: 4")
    add("--noise", default="0", metavar="A", help="random part of deepened layers; default: 0")
    add("--experts", default="8", metavar="E", help="with upcycle; default: 8")
    add("--top-k", default="2", metavar="K", help="experts per token; default: 2")
    add(
        "--attention-experts",
        default="1",
        metavar="A",
        help="with upcycle: attentions per layer, mixed per token (BAM); default: 1",
    )
    add("--seed", default="1234", metavar="N", help="of what is drawn; default: 1234")


def run_grow(args: argparse.Namespace) -> int:
    """Write the grown checkpoint; returns the exit status. Raises UserError for bad input."""
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    from megascale.checkpoint.load import find_at
    from megascale.checkpoint.tensors import Tensors, write_checkpoint
    from megascale.growth.grow import grow

    growth, out = growth_of(args), Path(args.out)
    found = [find_at(path) for path in args.checkpoints]
    parents = [(model_of(one), Tensors(one)) for one in found]
    model, pieces = grow(parents, growth)
    bytes_all = 4 * _parameters(model)
    made_by = f"megascale grow --operator {growth.operator} {_detail(growth)}"
    position = grown_position(found, model, made_by)
    manifest = write_checkpoint(out, _shown(pieces, bytes_all), position)
    before = sum(_parameters(one) for one, _ in parents)
    size = sum(file.bytes for file in manifest.files.values())
    print(
        f"{made_by}: {before:,} parameters become {_parameters(model):,}, "
        f"{parents[0][0].num_layers} layers {model.num_layers}; {size / 1e6:,.1f} MB in {out}\n"
        f"train it with:  megascale branch {out} CONFIG   (without a model section)"
    )
    return 0


def growth_of(args: argparse.Namespace) -> Growth:
    """The options as what to do. Raises UserError."""
    from megascale.growth.grow import OPERATORS, Growth

    if args.operator not in OPERATORS:
        raise UserError(f"--operator {args.operator}: give one of {', '.join(OPERATORS)}")
    try:
        noise = float(args.noise)
    except ValueError:
        noise = -1.0
    if not 0 <= noise < 1:
        raise UserError(f"--noise {args.noise} must be a number from 0 to below 1")
    moe = MoeConfig(
        num_experts=whole_number(args.experts, "--experts", 1, 1 << 20),
        top_k=whole_number(args.top_k, "--top-k", 1, 1 << 20),
        attention_experts=whole_number(args.attention_experts, "--attention-experts", 1, 1 << 10),
    )
    return Growth(
        operator=args.operator,
        factor=whole_number(args.factor, "--factor", 2, 1 << 10),
        noise=noise,
        moe=moe,
        seed=whole_number(args.seed, "--seed"),
    )


def _detail(growth: Growth) -> str:
    if growth.operator != "upcycle" or growth.moe is None:
        return f"--factor {growth.factor}"
    return f"--experts {growth.moe.num_experts} --top-k {growth.moe.top_k}" + (
        f" --attention-experts {growth.moe.attention_experts}"
    ) * (growth.moe.attention_experts > 1)


def model_of(found: Found) -> ModelConfig:
    """The model of a checkpoint. Raises UserError where it does not say."""
    try:
        return parse_config(found.manifest.position.config, where=str(found.folder)).model
    except UserError as error:
        raise UserError(f"the checkpoint does not say of which model it is: {error}") from None


def grown_position(found: Sequence[Found], model: ModelConfig, made_by: str) -> Any:
    """The position of a checkpoint made from others: their place in the data, no optimizer.

    Of a source that several have read, the furthest place counts.
    """
    from megascale.corpus.batches import Cursor
    from megascale.train.start import Origin, Parent

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


def _parameters(model: ModelConfig) -> int:
    from megascale.model.counts import count_parameters

    return count_parameters(model).total


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
