"""`megascale grow`: a larger model's checkpoint from the checkpoints of smaller ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.config import MoeConfig
from megascale.config.load import whole_number
from megascale.errors import UserError

if TYPE_CHECKING:
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
    from megascale.train.grow import write_grown

    growth, out = growth_of(args), Path(args.out)
    print(write_grown([find_at(path) for path in args.checkpoints], growth, out))
    print(f"train it with:  megascale branch {out} CONFIG   (without a model section)")
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
