"""Training steps on one GPU: where the host waits, and how much of the device they use."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from gpu_rows import Rows
from gpu_scene import (
    SMALL_MODEL,
    SMALL_TOKENS,
    config_of,
    device_of,
    half,
    learning,
    micro_batch,
    release,
    run,
    seconds,
    step,
)
from plain_gpt import PlainGpt

from megascale.config import ModelConfig, RunConfig
from megascale.model.counts import batch_flops
from megascale.monitor.device import mfu, peak_flops
from megascale.runtime.distributed import device_name

MODEL_1B = (
    "{num_layers: 16, hidden_size: 2048, num_heads: 32, num_kv_heads: 8, ffn_hidden_size: 8192, "
    "vocab_size: 128256}"
)
LAYERS_8B = (
    "{num_layers: 8, hidden_size: 4096, num_heads: 32, num_kv_heads: 8, ffn_hidden_size: 14336, "
    "vocab_size: 128256, tied_embeddings: false}"
)
EXPERTS = (
    "{num_layers: LAYERS, hidden_size: 2048, num_heads: 16, num_kv_heads: 4, head_dim: 128, "
    "vocab_size: 32000, moe: {num_experts: 64, top_k: 8, ffn_hidden_size: 1024}}"
)
SMALL_EXPERTS = (
    "{num_layers: LAYERS, hidden_size: 64, num_heads: 4, vocab_size: 512, "
    "moe: {num_experts: 8, top_k: 2, ffn_hidden_size: 32}}"
)
MICRO_BATCHES = 4
"""Of a step whose time is measured."""


def experts_model(rows: Rows, layers: int) -> str:
    """The mixture of experts of the acceptance."""
    return (SMALL_EXPERTS if rows.small else EXPERTS).replace("LAYERS", str(layers))


def dense_waits(rows: Rows) -> None:
    """Two micro-batches of a dense model without waiting."""
    model = SMALL_MODEL if rows.small else MODEL_1B.replace("num_layers: 16", "num_layers: 2")
    waits_of(rows, "dense model", model)


def expert_waits(rows: Rows) -> None:
    """Two micro-batches of a mixture of experts without waiting."""
    waits_of(rows, "64 experts", experts_model(rows, 2))


def waits_of(rows: Rows, what: str, model: str) -> None:
    """A row that says whether torch saw the host wait for the device, and where."""
    tokens = SMALL_TOKENS if rows.small else 8192
    with learning(config_of(model, tokens)) as learner:
        device = learner.ranks.device
        lengths = [tokens // 2, tokens // 4]
        run(learner, [micro_batch(learner.config, device, lengths)])
        with syncs_are_errors():
            batches = [micro_batch(learner.config, device, lengths) for _ in range(2)]
            run(learner, batches)
    rows.add(f"{what}: two micro-batches under set_sync_debug_mode('error'): waits", 0, "", None, 0)


def step_waits(rows: Rows) -> None:
    """Waits of a whole step."""
    tokens = SMALL_TOKENS if rows.small else 8192
    model = SMALL_MODEL if rows.small else MODEL_1B.replace("num_layers: 16", "num_layers: 2")
    with learning(config_of(model, tokens)) as learner:
        batches = [micro_batch(learner.config, learner.ranks.device, [tokens])]
        step(learner, batches)
        with counted_syncs() as seen:
            step(learner, batches)
    rows.add("waits of a whole step (one reads its values)", len(seen), "", None, 1)


@contextlib.contextmanager
def syncs_are_errors() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    set_sync_debug_mode("error")
    try:
        yield
    finally:
        set_sync_debug_mode("default")


@contextlib.contextmanager
def counted_syncs() -> Iterator[list[warnings.WarningMessage]]:
    """torch warns where the host waits for the device; the warnings."""
    set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield seen
    finally:
        set_sync_debug_mode("default")
        seen[:] = [one for one in seen if "synchroniz" in str(one.message)]


def set_sync_debug_mode(mode: str) -> None:
    """torch's, where there is a device."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def mfu_1b(rows: Rows) -> None:
    """1B model at 8K tokens."""
    mfu_of(rows, "1B", MODEL_1B, 8192, 50)


def mfu_8b_layers(rows: Rows) -> None:
    """8 layers of 8B at 16K tokens."""
    mfu_of(rows, "8 layers of 8B", LAYERS_8B, 16384, 55)


def mfu_of(rows: Rows, what: str, model: str, tokens: int, least: float) -> None:
    """Rows of our step, and of a plain compiled GPT's of the same shape in the same run."""
    if rows.small:
        model, tokens = SMALL_MODEL, SMALL_TOKENS
    with learning(config_of(model, tokens)) as learner:
        config, device = learner.config, learner.ranks.device
        batches = [micro_batch(config, device, [tokens]) for _ in range(MICRO_BATCHES)]
        ours = seconds(lambda: step(learner, batches), device, repeats=3)
    add_utilisation(rows, f"{what} at {tokens} tokens, full", config, tokens, ours, least)
    theirs = PlainStep(config.model, tokens, rows.small).seconds()
    release()
    rows.add(f"{what}: tokens/s", MICRO_BATCHES * tokens / ours, "")
    rows.add(f"{what}: speed over a plain compiled GPT", theirs / ours, "times", 1, None, True)


def add_utilisation(
    rows: Rows, what: str, config: RunConfig, tokens: int, taken: float, least: float
) -> None:
    """A row of the model FLOPs utilisation of a step with MICRO_BATCHES whole sequences."""
    flops = batch_flops(config.model, [tokens] * MICRO_BATCHES)
    used = mfu(flops, taken, 1, peak_flops(device_name(device_of()), "bf16"))
    found = None if used is None else 100 * used
    rows.add(f"{what}: MFU", found, "%", least, None, True)


class PlainStep:
    """A plain GPT, compiled layer by layer, in bf16 with fp32 weights and fused AdamW."""

    def __init__(self, model: ModelConfig, tokens: int, small: bool) -> None:
        torch._dynamo.reset()
        self.device = device_of()
        backend = "eager" if small else "inductor"
        with self.device:
            self.model = PlainGpt(model)
            self.ids = torch.randint(0, model.vocab_size or 1, (MICRO_BATCHES, tokens + 1))
        for layer in self.model.layers:
            layer.compile(backend=backend)
        self.loss = torch.compile(summed_loss, backend=backend)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def seconds(self) -> float:
        """Of a step with as many tokens as ours."""
        return seconds(self._step, self.device, repeats=3)

    def _step(self) -> None:
        self.optimizer.zero_grad()
        for ids in self.ids.split(1):
            with torch.autocast(self.device.type, half(self.device), enabled=self.device != CPU):
                loss = self.loss(self.model(ids[:, :-1]), ids[:, 1:])
            (loss / self.ids[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


CPU = torch.device("cpu")


def summed_loss(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """The cross-entropy in fp32, summed."""
    logits = logits_BTV.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, targets_BT.flatten(), reduction="sum")
