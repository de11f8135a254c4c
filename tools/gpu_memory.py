"""Memory and state on one GPU: offload, the peak of a step, a save and a resume."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from gpu_rows import Rows
from gpu_scene import (
    SMALL_MODEL,
    SMALL_TOKENS,
    config_of,
    learning,
    micro_batch,
    release,
    run,
    seconds,
    step,
    synchronize,
)
from gpu_training import LAYERS_8B, MODEL_1B

from megascale.checkpoint.manifest import Position
from megascale.checkpoint.save import Saver
from megascale.config import CheckpointConfig, Layout
from megascale.mesh.packing import MicroBatch
from megascale.model.activations import layer_activation_bytes
from megascale.optim.rank_memory import stage_memory
from megascale.planner.plan import kept_share
from megascale.runtime.distributed import device_bytes
from megascale.training.step import Learner

RATIOS = (0.0, 0.5, 1.0)


def offload(rows: Rows) -> None:
    """Activations in host memory."""
    model, tokens = (SMALL_MODEL.replace("num_layers: 2", "num_layers: 4"), SMALL_TOKENS)
    if not rows.small:
        model, tokens = LAYERS_8B, 16384
    with learning(config_of(model, tokens, "train.deterministic=true")) as learner:
        config, device = learner.config, learner.ranks.device
        layout, layers = learner.ranks.layout, config.model.num_layers
        whole = tokens * layers * layer_activation_bytes(config, layout)
        batch = micro_batch(config, device, [tokens])
        first: list[torch.Tensor] = []
        alone_s = held_by_all = 0.0
        for ratio in RATIOS:
            part = replace(batch, offload=ratio)
            held, grads = held_and_gradients(learner, part)
            taken = seconds(lambda part=part: run(learner, [part]), device, repeats=3)
            what = f"offload {ratio:g}"
            if ratio == 0:
                first, alone_s, held_by_all = grads, taken, held
                rows.add(f"{what}: milliseconds of a micro-batch", 1e3 * taken, "ms")
                continue
            same = all(map(torch.equal, first, grads))
            rows.add(f"{what}: gradients are those of offload 0", int(same), "", 1)
            expected = held_by_all - (1 - kept_share(ratio, layers)) * whole
            error = held / expected - 1 if expected > 0 else None
            rows.add(f"{what}: memory over the estimate, less 1", error, "", -0.05, 0.05, True)
            rows.add(f"{what}: time over that without", taken / alone_s, "times", None, 1.05, True)


def held_and_gradients(learner: Learner, batch: MicroBatch) -> tuple[int, list[torch.Tensor]]:
    """Bytes that are held between the passes of a micro-batch, and the gradients on the host."""
    model, device = learner.model, learner.ranks.device
    model.zero_grad_buffer()
    run(learner, [batch])  # takes the host memory, and makes what is made once
    model.zero_grad_buffer()
    before = device_bytes(device)
    with model.offloader.micro_batch(batch.offload):
        loss = model.chunks[0](
            input_ids=batch.tokens_T[None],
            position_ids=batch.segments.positions_T[None],
            attention_mask=None,
            labels=batch.targets_T[None],
            loss_mask=batch.loss_mask_T[None],
            packed_seq_params=batch.segments,
        )
    synchronize(device)
    held = device_bytes(device) - before
    loss.sum().backward()
    grads = [weight.main_grad.to("cpu", copy=True) for weight in model.parameters()]
    return held, grads


def peak(rows: Rows) -> None:
    """Peak memory of a step."""
    cases = ((SMALL_MODEL, SMALL_TOKENS),) if rows.small else ((MODEL_1B, 8192), (LAYERS_8B, 16384))
    for model, tokens in cases:
        release()
        with learning(config_of(model, tokens)) as learner:
            config, device = learner.config, learner.ranks.device
            batches = [micro_batch(config, device, [tokens]) for _ in range(2)]
            for _ in range(2):
                step(learner, batches)
            found = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            planned = stage_memory(config, Layout.of(config, 1), 0).total
        what = f"{config.model.num_layers} layers of {config.model.hidden_size} at {tokens} tokens"
        rows.add(f"{what}: planned memory", planned / 2**30, "GiB")
        ratio = None if found is None else found / planned
        rows.add(f"{what}: peak over the plan", ratio, "", 0.9, 1.1, True)


def save(rows: Rows) -> None:
    """Stall of a save."""
    model, tokens = (SMALL_MODEL, SMALL_TOKENS) if rows.small else (MODEL_1B, 8192)
    model = model.replace("num_layers: 16", "num_layers: 4")
    with tempfile.TemporaryDirectory() as folder, learning(config_of(model, tokens)) as learner:
        batches = [micro_batch(learner.config, learner.ranks.device, [tokens])]
        saver = Saver(folder, CheckpointConfig(), learner.ranks)
        step(learner, batches)
        saver.prepare(learner.model, learner.optimizer)
        position = Position(step=1, tokens_seen=tokens, seed=0, config="", cursor={})
        alone = seconds(lambda: step(learner, batches), learner.ranks.device, repeats=3)
        stall = step_with_save(learner, batches, saver, position) - alone
        result = saver.wait()
        assert result is not None and result.error is None, result
    rows.add("a save: stall of training", 1e3 * stall, "ms")
    rate = result.bytes / max(stall, 1e-9) / 1e9
    rows.add("a save: bytes over the stall", rate, "GB/s", 40, None, True)


def step_with_save(
    learner: Learner, batches: Sequence[MicroBatch], saver: Saver, position: Position
) -> float:
    """Seconds of a save's first stage and of the step after it."""
    synchronize(learner.ranks.device)
    began = time.perf_counter()
    saver.save(position, learner.model, learner.optimizer)
    step(learner, batches)
    synchronize(learner.ranks.device)
    return time.perf_counter() - began


def resume(rows: Rows) -> None:
    """Resume of a run with train.deterministic."""
    from crash_drill import compare, curve, finish, start
    from tiny_corpus import tiny_config

    precision = "bf16" if torch.cuda.is_available() else "fp32"
    length = "{tokens: 12000, precision: PRECISION, deterministic: true}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny_config(folder, train=length.replace("PRECISION", precision))
        finish(start(config, folder / "calm", 1))
        finish(start(config, folder / "run", 1, "train.stop_after_steps=10"))
        finish(start(config, folder / "run", 1, "--resume", "latest"))
        result = compare(curve(folder / "calm"), curve(folder / "run"))
    rows.add(f"{result.steps} steps, stopped and resumed: bit-equal", int(result.bit_equal), "", 1)
    rows.add("largest relative difference of a loss", result.worst_relative, "")
