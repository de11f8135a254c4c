"""`megascale export --to megatron`: a checkpoint that Megatron loads, optimizer included."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.config.load import whole_number
from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.checkpoint.load import Found
    from megascale.config import RunConfig


def add_megatron_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that only `--to megatron` has."""
    group = parser.add_argument_group("exports to Megatron")
    group.add_argument(
        "--optimizer",
        choices=("keep", "drop"),
        help="write AdamW's state too, or the weights alone; default: keep it if there is one",
    )
    group.add_argument(
        "--expert-parallel",
        metavar="N",
        help="ranks over which Megatron will spread experts; with more than 1, megatron-core keeps "
        "settings of a second optimizer for them; default: parallel.expert of the run",
    )


def export_megatron(found: Found, out: Path, args: argparse.Namespace) -> list[str]:
    """Fill the empty folder `out`; returns a summary. Raises UserError for bad input."""
    from megascale.checkpoint.tensors import Tensors
    from megascale.convert.closed_layers import refuse_closed_layers
    from megascale.convert.huggingface.tokenizer_folder import copy_tokenizer
    from megascale.convert.megatron.arguments import common_state, refuse_unknown
    from megascale.convert.megatron.write import MegatronWriter
    from megascale.convert.one_rank import run_config
    from megascale.corpus.sources import TOKENIZER_FOLDER
    from megascale.run.checkpoint_tokenizer import tokenizer_folder

    config, position = run_config(found), found.manifest.position
    refuse_unknown(config.model)
    refuse_closed_layers(Tensors(found))
    adam = _adam(found, config, args.optimizer)
    experts = _experts_cut(config, args.expert_parallel)
    progress = (position.step, position.tokens_seen)
    common = common_state(config, progress, adam, experts)
    writer = MegatronWriter(found, config.model, adam is not None)
    folder = writer.write(out, common, position.step)
    source = tokenizer_folder(found, config, args.tokenizer)
    copied = source is not None and copy_tokenizer(source, folder / TOKENIZER_FOLDER)
    return [
        f"Megatron checkpoint of iteration {position.step:,}",
        f"  position    {position.tokens_seen:,} tokens, "
        f"{common['args'].consumed_train_samples:,} samples of {config.data.context_tokens:,}",
        f"  optimizer   {_words(adam, experts)}",
        f"  vocabulary  {config.model.vocab_size:,} ids of {common['args'].padded_vocab_size:,} "
        "rows; padded rows are 0",
        f"  tokenizer   {f'of {source}' if copied else 'none; --tokenizer adds one'}",
    ]


def _adam(found: Found, config: RunConfig, wish: str | None) -> dict[str, Any] | None:
    """Steps and settings of the optimizer's state that is written; None: it is not.

    Raises UserError where it is asked for and missing, or of another optimizer than AdamW.
    """
    from megascale.checkpoint.tensors import Tensors
    from megascale.config.lr_curves import expand
    from megascale.config.optimizers import OPTIMIZERS
    from megascale.convert.megatron.optimizer import MOMENTS
    from megascale.optim.schedule import lr_at

    steps, optim = found.manifest.optimizer_steps, config.optim
    if wish == "drop" or (steps == 0 and wish is None):
        return None
    if steps == 0:
        raise UserError(
            f"checkpoint {found.folder} has no state of an optimizer; leave --optimizer"
        )
    names = Tensors(found).state_names
    if names != set(MOMENTS):
        listed = ", ".join(sorted(names))
        raise UserError(
            f"the optimizer keeps {listed[:100]}, and Megatron's AdamW {' and '.join(MOMENTS)}; "
            "--optimizer drop exports the weights alone"
        )
    tokens = found.manifest.position.tokens_seen
    schedule = optim.schedule or expand(optim, config.train.tokens or tokens).schedule
    beta1 = OPTIMIZERS[optim.name].beta1 if optim.beta1 is None else optim.beta1
    return {"step": steps, "lr": lr_at(tokens, schedule), "beta1": beta1}


def _experts_cut(config: RunConfig, wish: str | None) -> bool:
    """Whether the loading run spreads experts over ranks. Raises UserError for a wrong number."""
    moe = config.model.moe
    if wish is None:
        return moe is not None and config.parallel.expert > 1
    if moe is None:
        raise UserError("--expert-parallel goes with a model that has experts; this one has none")
    ranks = whole_number(wish, "--expert-parallel", 1, moe.num_experts)
    if moe.num_experts % ranks:
        raise UserError(f"--expert-parallel {ranks} must divide the {moe.num_experts} experts")
    return bool(ranks > 1)


def _words(adam: dict[str, Any] | None, experts: bool) -> str:
    if adam is None:
        return "none, only the weights"
    whose = ", of experts apart (expert parallelism)" if experts else ""
    return f"AdamW after {adam['step']:,} steps; lr = {adam['lr']:g}{whose}"
