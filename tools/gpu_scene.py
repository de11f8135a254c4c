"""Models, micro-batches and times for the acceptance on a GPU, and small on CPU."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megascale.config import RunConfig, finalize, parse_config
from megascale.mesh.packing import MicroBatch, TokenSequence, pack
from megascale.model.build import build_model, pack_multiple
from megascale.optim.build import build_optimizer
from megascale.runtime import distributed
from megascale.training.step import Learner, run_micro_batches, train_step

SMALL_MODEL = (
    "{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 128, "
    "vocab_size: 512}"
)
"""In the place of a large one, on CPU."""
SMALL_TOKENS = 256
TEXT = """
data: {sources: {random: {path: none}}, context_tokens: TOKENS, global_batch_tokens: TOKENS}
planner: {capacity_tokens: TOKENS}
"""


def config_of(model: str, tokens: int, *overrides: str) -> RunConfig:
    """A run of `model`, a YAML mapping, with micro-batches of `tokens` tokens."""
    text = f"model: {model}\n" + TEXT.replace("TOKENS", str(tokens))
    if not torch.cuda.is_available():
        overrides = ("train.precision=fp32", *overrides)
    config = parse_config(text, overrides)
    assert config.model.vocab_size is not None
    return finalize(config, {"random": 10**12}, config.model.vocab_size)


@contextlib.contextmanager
def learning(config: RunConfig) -> Iterator[Learner]:
    """The model and the optimizer of a config. Their memory is free after the block."""
    ranks = distributed.start(config)
    model = build_model(config, ranks)
    learner = Learner(config, ranks, model, build_optimizer(config, model))
    try:
        yield learner
    finally:
        # the caller may hold the learner still
        learner.model = learner.optimizer = model = None  # type: ignore[assignment]
        distributed.stop()
        release()


def release() -> None:
    """Give freed memory of the device back, so that the next model finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def micro_batch(config: RunConfig, device: torch.device, lengths: Sequence[int]) -> MicroBatch:
    """Random tokens in sequences of these lengths."""
    generator = np.random.default_rng(sum(lengths))
    ids = [generator.integers(0, config.model.vocab_size, length + 1) for length in lengths]
    sequences = [TokenSequence(row[:-1], row[1:]) for row in ids]
    return pack(sequences, 0, pack_multiple(config, device), device)


def run(learner: Learner, batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Forward and backward pass of micro-batches; see `run_micro_batches`."""
    balance = learner.model.balance
    if balance is not None:
        balance.begin(len(batches), sum(batch.num_tokens for batch in batches))
    return run_micro_batches(learner, batches, len(batches))


def step(learner: Learner, batches: Sequence[MicroBatch], ranks: int = 1) -> float:
    """A whole training step of ranks that have equally many tokens each; its loss."""
    tokens = ranks * sum(batch.num_tokens for batch in batches)
    return train_step(learner, batches, len(batches), tokens, tokens).loss


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    function: Callable[[], object], device: torch.device, repeats: int = 5, warm_ups: int = 2
) -> float:
    """The median time of a call, after some that are not counted."""
    times = []
    for turn in range(warm_ups + repeats):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        if turn >= warm_ups:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def device_of() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def half(device: torch.device) -> torch.dtype:
    """The precision of training there: attention on CPU has no bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
