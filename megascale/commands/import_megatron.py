"""`megascale import` of a Megatron checkpoint: weights, AdamW's state and the position."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.config import dump_config
from megascale.config.load import whole_number
from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.convert.megatron.read import Foreign


def add_megatron_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that only a Megatron checkpoint needs."""
    add = parser.add_argument_group("for a checkpoint of Megatron").add_argument
    add(
        "--vocab-size",
        metavar="N",
        help="ids of the tokenizer; further rows of the embedding are padding",
    )
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="prepared corpus or Hugging Face folder, in place of --vocab-size",
    )
    add(
        "--architecture",
        metavar="FILE",
        help="YAML with options under Megatron's names; they replace those of the checkpoint",
    )
    add(
        "--optimizer",
        choices=("keep", "drop"),
        help="keep AdamW's state, for a branch with start.optimizer=keep, or leave it out; "
        "default: keep",
    )


def import_megatron(path: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """Fill the empty folder `out`; returns a summary. Raises UserError for bad input."""
    import torch

    from megascale.checkpoint.manifest import Position
    from megascale.checkpoint.tensors import fill_checkpoint
    from megascale.convert.huggingface.tokenizer_folder import copy_tokenizer
    from megascale.convert.megatron.read import Foreign
    from megascale.convert.megatron.source import read_description
    from megascale.corpus.sources import TOKENIZER_FOLDER
    from megascale.run.origin import Origin, Parent

    tokenizer = _tokenizer_of(path, args)
    by_hand = read_description(Path(args.architecture)) if args.architecture else None
    keeps = args.optimizer != "drop"
    size = _vocab_size(tokenizer, args)
    foreign = Foreign.open(path, size, by_hand, args.architecture or "", keeps)
    dtype = foreign.dtype
    if args.dtype is not None:
        dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    config, step = foreign.config(dtype), foreign.progress.iteration or 0
    parent = Parent(str(foreign.source.folder.resolve()), step, foreign.tokens)
    cursor = {"origin": Origin("megascale import", (parent,)).to_json()}
    position = Position(step, foreign.tokens, config.seed, dump_config(config), cursor)
    pieces = foreign.reader(dtype).pieces(foreign.model, foreign.boxes)
    fill_checkpoint(out, pieces, position, foreign.adam.steps if foreign.adam else 0)
    copied = tokenizer is not None and copy_tokenizer(tokenizer, out / TOKENIZER_FOLDER)
    kept = f"{args.out}/{TOKENIZER_FOLDER}" if copied else "none there"
    return [*_summary(foreign, config.train.precision), f"  tokenizer   {kept}"]


def _tokenizer_of(path: Path, args: argparse.Namespace) -> Path | None:
    """The folder of the tokenizer: the one given, or Megatron-Bridge's in the checkpoint."""
    from megascale.convert.huggingface.tokenizer_folder import has_tokenizer
    from megascale.convert.megatron.source import folder_of
    from megascale.corpus.sources import TOKENIZER_FOLDER

    if args.tokenizer:
        return Path(args.tokenizer)
    saved = folder_of(path) / TOKENIZER_FOLDER
    return saved if has_tokenizer(saved) else None


def _vocab_size(tokenizer: Path | None, args: argparse.Namespace) -> int:
    """Ids of the tokenizer. Raises UserError where no option gives them, or too few are given."""
    from megascale.convert.megatron.vocabulary import ids_of

    given = args.vocab_size and whole_number(args.vocab_size, "--vocab-size", 1, 1 << 31)
    if tokenizer is None:
        if given is None:
            raise UserError(
                "Megatron pads the vocabulary of a checkpoint and does not store the number of "
                "ids; give --tokenizer FOLDER or --vocab-size N"
            )
        return int(given)
    known = ids_of(tokenizer)
    if given is not None and given < known:
        raise UserError(f"--vocab-size {given} is below the {known:,} ids of {tokenizer}")
    return int(given or known)


def _summary(foreign: Foreign, precision: str) -> list[str]:
    from megascale.model.counts import count_parameters

    size = count_parameters(foreign.model).total
    lines = [
        f"Megatron checkpoint of {size:,} parameters in {precision}",
        f"  position    iteration {foreign.progress.iteration or 0:,}, {foreign.tokens:,} tokens",
        f"  optimizer   {_optimizer(foreign)}",
        f"  vocabulary  {_vocabulary(foreign)}",
        f"  model       {_model(foreign.model)}",
    ]
    if foreign.unknown:
        lines.append(f"  not known   {'; '.join(foreign.unknown)}")
    return lines


def _optimizer(foreign: Foreign) -> str:
    if foreign.adam is None:
        return "none, only the weights"
    settings = ", ".join(
        f"{name} = {str(value)[:40]}" for name, value in foreign.adam.settings.items()
    )
    return f"AdamW after {foreign.adam.steps:,} steps{f'; {settings}' if settings else ''}"


def _vocabulary(foreign: Foreign) -> str:
    ids, rows = foreign.model.vocab_size or 0, foreign.names.rows
    if ids == rows:
        return f"{ids:,} ids, no padded rows"
    return (
        f"{ids:,} ids of {rows:,} rows; the {rows - ids:,} padded rows are left out. Megatron's "
        "softmax gives them some probability; here it is 0, so losses here are lower"
    )


def _model(model: Any) -> str:
    moe = f", {model.moe.num_experts} experts, top {model.moe.top_k}" if model.moe else ""
    traits = {
        "tied": model.tied_embeddings,
        "qk-norm": model.qk_norm,
        "biases of queries, keys and values": model.qkv_bias,
        "Llama 3's rope scaling": model.rope_scaling is not None,
        f"window of {model.sliding_window}": model.sliding_window is not None,
    }
    listed = "".join(f", {name}" for name, is_so in traits.items() if is_so)
    return (
        f"{model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads in "
        f"{model.num_kv_heads} groups of size {model.head_dim}, inner width "
        f"{model.ffn_hidden_size}, rope base {model.rope_base:g}, norm eps {model.norm_eps:g}"
        f"{moe}{listed}"
    )
