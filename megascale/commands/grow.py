"""`megascale grow`: a larger model's checkpoint from the checkpoints of smaller ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from megascale.config import MoeConfig
from megascale.config.load import whole_number
from megascale.errors import UserError
from megascale.growth.operators import OPERATORS, Growth


def add_grow_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale grow`."""
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="RUN_OR_CHECKPOINT", help="run_dir or checkpoint folder")
    add("--out", required=True, metavar="DIR", help="folder of the new checkpoint")
    add(
        "--operator",
        default="stack",
        metavar=f"{{{','.join(OPERATORS)}}}",
        help="; ".join(f"{name}: {operator.meaning}" for name, operator in OPERATORS.items())
        + "; default: stack",
    )
    add("--factor", metavar="G", help="times the layers, or the width; default: 4")
    add("--noise", metavar="A", help="with stack, interpolate or resize: random part; default: 0")
    add("--vocab", metavar="N", help="with resize: ids of the larger vocabulary")
    add("--mask-tokens", metavar="N", help="with random: tokens over which new layers open")
    add("--steps", metavar="N", help="with learn: steps, each with a global batch; default: 100")
    add("--experts", metavar="E", help="with upcycle; default: 8")
    add("--top-k", metavar="K", help="with upcycle: experts per token; default: 2")
    add(
        "--attention-experts",
        metavar="A",
        help="with upcycle: attentions per layer, mixed per token (BAM); default: 1",
    )
    add(
        "--optimizer",
        default="drop",
        metavar="{drop,grow}",
        help="AdamW's moments: left behind, or grown for a branch with start.optimizer=keep",
    )
    add("--seed", default="1234", metavar="N", help="of what is drawn; default: 1234")


def run_grow(args: argparse.Namespace) -> int:
    """Write the grown checkpoint; returns the exit status. Raises UserError for bad input."""
    from megascale.runtime import distributed

    distributed.prepare_device("auto" if args.operator == "learn" else "cpu")
    from megascale.checkpoint.load import find_at
    from megascale.run.origin import home_of
    from megascale.training.grow_checkpoint import write_grown

    growth, out = growth_of(args), Path(args.out)
    found = [find_at(path) for path in args.checkpoints]
    for one in found:
        home = home_of(one.folder.resolve())
        if home in out.resolve().parents:
            raise UserError(f"--out {out} is in {home}, which growing only reads; take another")
    print(write_grown(found, growth, out))
    print(f"train it with:  megascale branch {out} CONFIG   (without a model section)")
    return 0


def growth_of(args: argparse.Namespace) -> Growth:
    """The options as what to do. Raises UserError."""
    if args.operator not in OPERATORS:
        raise UserError(f"--operator {args.operator}: give one of {', '.join(OPERATORS)}")
    if args.optimizer not in ("drop", "grow"):
        raise UserError(f"--optimizer {args.optimizer}: give drop or grow")
    _require_fitting(args)
    try:
        noise = float(args.noise or 0)
    except ValueError:
        noise = -1.0
    if not 0 <= noise < 1:
        raise UserError(f"--noise {args.noise} must be a number from 0 to below 1")
    moe = MoeConfig(
        num_experts=whole_number(args.experts or "8", "--experts", 1, 1 << 20),
        top_k=whole_number(args.top_k or "2", "--top-k", 1, 1 << 20),
        attention_experts=whole_number(
            args.attention_experts or "1", "--attention-experts", 1, 1 << 10
        ),
    )
    return Growth(
        operator=args.operator,
        factor=whole_number(args.factor or "4", "--factor", 2, 1 << 10),
        noise=noise,
        moe=moe,
        vocab_size=args.vocab and whole_number(args.vocab, "--vocab", 1, 1 << 31),
        optimizer=args.optimizer,
        steps=whole_number(args.steps or "100", "--steps"),
        mask_tokens=args.mask_tokens and whole_number(args.mask_tokens, "--mask-tokens", 1),
        seed=whole_number(args.seed, "--seed"),
    )


def _require_fitting(args: argparse.Namespace) -> None:
    """Raise UserError for an option that the operator has no use for, or that it lacks."""
    for name in sorted({name for operator in OPERATORS.values() for name in operator.options}):
        having = [key for key, operator in OPERATORS.items() if name in operator.options]
        if getattr(args, name) is not None and args.operator not in having:
            word = name.replace("_", "-")
            raise UserError(f"--{word} goes with {' or '.join(having)}, not {args.operator}")
    for name, hint in OPERATORS[args.operator].needs.items():
        if getattr(args, name) is None:
            word = name.replace("_", "-")
            raise UserError(f"--operator {args.operator} needs --{word}, {hint}")
