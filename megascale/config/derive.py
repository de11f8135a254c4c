"""What follows from a config: the values of options that were left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megascale.config.lr_curves import expand
from megascale.config.optimizers import OPTIMIZERS
from megascale.config.schema import ModelConfig, OptimConfig, RunConfig, StageConfig
from megascale.config.validation import validate
from megascale.errors import UserError


def finalize(config: RunConfig, source_tokens: Mapping[str, int], vocab_size: int) -> RunConfig:
    """Fill every derived field and validate the result.

    `source_tokens` gives the training tokens of each source and `vocab_size` the largest
    vocabulary among them (see `corpus.sources`). The result does not depend on the number of
    ranks, so that a run can be resumed on another one; finalizing twice changes nothing.
    Raises UserError with the option and a value that works.
    """
    if isinstance(config.optim.lr, str) or isinstance(config.data.global_batch_tokens, str):
        raise UserError(
            "optim.lr or data.global_batch_tokens is steplaw where a number is needed; "
            "megascale hparams steplaw prints it"
        )
    model = _finalize_model(config.model, vocab_size)
    parallel = config.parallel
    if parallel.sequence_parallel is None:
        parallel = replace(parallel, sequence_parallel=parallel.tensor > 1)
    total = sum(source_tokens.values()) or 1
    blend = {name: tokens / total for name, tokens in source_tokens.items()}
    data = replace(config.data, stages=config.data.stages or (StageConfig(blend=blend),))
    planner = config.planner
    if planner.capacity_tokens is None:
        planner = replace(planner, capacity_tokens=data.context_tokens)
    config = replace(
        config,
        model=model,
        parallel=parallel,
        data=data,
        planner=planner,
        optim=_finalize_optim(config.optim, config.train.tokens),
    )
    validate(config)
    return config


def _finalize_model(model: ModelConfig, vocab_size: int) -> ModelConfig:
    ffn = model.ffn_hidden_size or -(-model.hidden_size * 8 // 3 // 64) * 64
    moe = model.moe
    if moe is not None and moe.ffn_hidden_size is None:
        moe = replace(moe, ffn_hidden_size=max(1, ffn // max(1, moe.top_k)))
    return replace(
        model,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.hidden_size // max(1, model.num_heads),
        ffn_hidden_size=ffn,
        vocab_size=vocab_size if model.vocab_size is None else model.vocab_size,
        moe=moe,
    )


def _finalize_optim(optim: OptimConfig, tokens: int) -> OptimConfig:
    beta1 = optim.beta1
    if beta1 is None:
        beta1 = OPTIMIZERS[optim.name].beta1
    return expand(replace(optim, beta1=beta1), tokens)
