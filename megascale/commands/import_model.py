"""`megascale import`: a model of Hugging Face, or a checkpoint of Megatron, becomes a checkpoint
that runs start from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megascale.commands.import_megatron import add_megatron_arguments, import_megatron
from megascale.config import DataConfig, RunConfig, TrainConfig, dump_config
from megascale.config.load import whole_number
from megascale.errors import UserError

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-2
"""Rounding in fp32 reached 7e-4 with a real model of 30 layers; weights in a wrong order give more
than 1."""


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale import`."""
    add = parser.add_argument
    add(
        "model",
        metavar="FOLDER",
        help="a model of Hugging Face (config.json and safetensors), or a checkpoint of Megatron "
        "(torch_dist, or the folder of its iterations)",
    )
    add("out", metavar="OUT", help="checkpoint folder to make, with the tokenizer in OUT/tokenizer")
    add(
        "--dtype",
        choices=("fp32", "bf16"),
        help="type of the weights; default: as they are (fp16 becomes fp32)",
    )
    add_check_arguments(parser)
    add_megatron_arguments(parser)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `import` and `export` have in common."""
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare logits with those of transformers; needs memory for the model in fp32",
    )
    parser.add_argument(
        "--check-tokens",
        metavar="N",
        help="longest sequence of the check; default: what reaches beyond the sliding window and "
        "the context where scaling of rope begins, or as much as some minutes and 16 GiB allow",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference allowed, over the logits' standard deviation; "
        f"default: {TOLERANCE:g}",
    )


def run_import(args: argparse.Namespace) -> int:
    """Convert, compare and say so; returns the exit status. Raises UserError for bad input."""
    from megascale.runtime import distributed

    distributed.prepare_device("auto")
    from megascale.checkpoint.folder import whole_or_not_at_all
    from megascale.convert.megatron.source import is_megatron

    source, out = Path(args.model), Path(args.out)
    from_megatron = is_megatron(source)
    _refuse_other_options(args, from_megatron)
    convert = import_megatron if from_megatron else _import_hugging_face
    with whole_or_not_at_all(out) as unfinished:
        said = convert(source, unfinished, args)
    print("\n".join([f"{out}: {said[0]}", *said[1:]]))
    return 0


def _refuse_other_options(args: argparse.Namespace, from_megatron: bool) -> None:
    """Raise UserError for an option that belongs to the other format."""
    if from_megatron:
        if args.check_tokens or args.tolerance != TOLERANCE:
            raise UserError("--check-tokens and --tolerance go with a model of Hugging Face")
        return
    for name in ("vocab_size", "tokenizer", "architecture", "optimizer"):
        if getattr(args, name) is not None:
            word = name.replace("_", "-")
            raise UserError(f"--{word} goes with a checkpoint of Megatron; {args.model} is none")


def _import_hugging_face(source: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """Fill the empty folder `out`; returns a summary. Raises UserError for bad input."""
    import torch

    from megascale.checkpoint.manifest import Position
    from megascale.checkpoint.tensors import fill_checkpoint
    from megascale.convert.huggingface.config import import_notes, model_of, read_config
    from megascale.convert.huggingface.documents import CONFIG
    from megascale.convert.huggingface.kept import keep
    from megascale.convert.huggingface.model_files import ModelFiles
    from megascale.convert.huggingface.tokenizer_folder import copy_tokenizer
    from megascale.convert.huggingface.weights import check_files, import_pieces
    from megascale.corpus.sources import TOKENIZER_FOLDER
    from megascale.model.counts import count_parameters

    theirs = read_config(source)
    model, files = model_of(theirs, source / CONFIG), ModelFiles.open(source)
    dtype = check_files(files, model, theirs.model_type)
    if args.dtype is not None:
        dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    precision: Literal["fp32", "bf16"] = "fp32" if dtype == torch.float32 else "bf16"
    data = DataConfig(context_tokens=theirs.max_position_embeddings)
    config = RunConfig(model=model, data=data, train=TrainConfig(precision=precision))
    position = Position(0, 0, config.seed, dump_config(config), {})
    fill_checkpoint(out, import_pieces(files, model, theirs.model_type, dtype), position)
    keep(source, theirs, out)
    size = count_parameters(model).total
    said = [f"{theirs.model_type} of {size:,} parameters in {precision}"]
    if args.check:
        said.append(f"  logits      {_compare(source, out, dtype, args)}")
    has_tokenizer = copy_tokenizer(source, out / TOKENIZER_FOLDER)
    what = f"{args.out}/{TOKENIZER_FOLDER}" if has_tokenizer else "none there"
    notes = (f"  note        {note}" for note in import_notes(theirs))
    return [*said, f"  tokenizer   {what}", *notes]


def _compare(source: Path, out: Path, dtype: torch.dtype, args: argparse.Namespace) -> object:
    from megascale.checkpoint.load import find_at
    from megascale.convert.compare_logits import compare_logits, require_close

    difference = compare_logits(source, find_at(out), dtype, check_tokens(args))
    require_close(difference, args.tolerance)
    return difference


def check_tokens(args: argparse.Namespace) -> int | None:
    """The value of --check-tokens. Raises UserError for what is no number."""
    return args.check_tokens and whole_number(args.check_tokens, "--check-tokens", least=2)
