"""`megascale export`: a checkpoint becomes a model folder that `transformers` loads, or a
checkpoint that Megatron loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.commands.export_megatron import add_megatron_export_arguments, export_megatron
from megascale.commands.import_model import TOLERANCE, add_check_arguments, check_tokens
from megascale.config.load import whole_number
from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.checkpoint.load import Found

SHARD_BYTES = "4Gi"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale export`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run_dir for its latest")
    add("out", metavar="OUT", help="folder to make")
    add(
        "--to",
        choices=("huggingface", "megatron"),
        default="huggingface",
        help="a model of Hugging Face, or a checkpoint of Megatron (torch_dist) in "
        "OUT/iter_*; default: huggingface",
    )
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="prepared corpus or Hugging Face folder; default: what the checkpoint was imported "
        "with, else that of the run's first corpus that has one, else that of the model it "
        "comes from",
    )
    add(
        "--shard-bytes",
        metavar="N",
        help=f"largest file, such as 500M or 2Gi; default: {SHARD_BYTES}",
    )
    add_check_arguments(parser)
    add_megatron_export_arguments(parser)


def run_export(args: argparse.Namespace) -> int:
    """Convert, compare and say so; returns the exit status. Raises UserError for bad input."""
    from megascale.runtime import distributed

    distributed.prepare_device("auto")
    from megascale.checkpoint.folder import whole_or_not_at_all
    from megascale.checkpoint.load import find_at

    _refuse_other_options(args)
    convert = export_megatron if args.to == "megatron" else _export_hugging_face
    found, out = find_at(args.checkpoint), Path(args.out)
    with whole_or_not_at_all(out) as unfinished:
        said = convert(found, unfinished, args)
    print("\n".join([f"{out}: {said[0]}", *said[1:]]))
    return 0


def _refuse_other_options(args: argparse.Namespace) -> None:
    """Raise UserError for an option that belongs to the other format."""
    if args.to == "megatron":
        if args.check_tokens or args.tolerance != TOLERANCE or args.shard_bytes:
            raise UserError(
                "--check-tokens, --tolerance and --shard-bytes go with --to huggingface"
            )
    elif args.optimizer or args.expert_parallel:
        raise UserError("--optimizer and --expert-parallel go with --to megatron")


def _export_hugging_face(found: Found, out: Path, args: argparse.Namespace) -> list[str]:
    """Write the model folder; what there is to say."""
    from megascale.checkpoint.tensors import Tensors
    from megascale.convert.compare_logits import compare_logits, require_close
    from megascale.convert.huggingface.model_files import write_files
    from megascale.convert.huggingface.model_folder import write_settings
    from megascale.convert.huggingface.weights import export_shapes, export_tensors
    from megascale.convert.one_rank import run_config
    from megascale.run.checkpoint_tokenizer import tokenizer_folder
    from megascale.run.origin import kept_of

    shard_bytes = whole_number(args.shard_bytes or SHARD_BYTES, "--shard-bytes", least=1)
    config, stored = run_config(found), Tensors(found)
    dtype = stored.read("decoder.final_layernorm.weight").dtype
    type_name = str(dtype).removeprefix("torch.")
    source = tokenizer_folder(found, config, args.tokenizer)
    family, notes = write_settings(kept_of(found), config, type_name, source, out)
    shapes = export_shapes(config.model, family)
    tensors = export_tensors(stored, config.model, family)
    files = write_files(out, shapes, dtype, tensors, shard_bytes)
    said = [f"{family} in {type_name}, {len(files)} file{'s' * (len(files) > 1)}"]
    if args.check:
        difference = compare_logits(out, found, dtype, check_tokens(args))
        require_close(difference, args.tolerance)
        said.append(f"  logits      {difference}")
    said.append(f"  tokenizer   {f'of {source}' if source else 'none; --tokenizer adds one'}")
    return said + [f"  note        {note}" for note in notes]
