"""The model of time of `megascale plan --device` against step times that others have published."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megascale.config import (
    DataConfig,
    Layout,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    PlannerConfig,
    RunConfig,
    SourceConfig,
    finalize,
)
from megascale.devices.step_time import StepTime, step_cost
from megascale.devices.table import device_of
from megascale.planner.peers.static import plan_static_rings
from megascale.run.on_device import Figures, figures
from megascale.run.step_problem import step_problem

RESULTS = Path(__file__).parents[1] / "configs/results/devices.json"
LLAMA_SOURCE = "github.com/NVIDIA/dgxc-benchmarking at 143b90dd, llama3.1: NeMo 24.09, bf16, H100"
GPT_OSS_SOURCE = (
    "github.com/NVIDIA-NeMo/Megatron-Bridge at 0a25f911, docs/performance-summary-archive.md: "
    "NeMo 26.02 and 25.11, bf16, H100; seconds from tokens per second"
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One run of others."""

    model: str
    devices: int
    tensor: int = 1
    pipeline: int = 1
    ring: int = 1
    """Ranks of context parallelism."""
    expert: int = 1
    context: int = 8192
    sequences: int
    """Of a step, all of `context` tokens."""
    interleaved: int = 1
    """Parts into which each stage is cut so that the pipeline fills faster (VP). Ours has 1."""
    step_s: float


def _llama(model: str, devices: int, sequences: int, step_s: float) -> Published:
    tensor, pipeline, interleaved = {"8b": (1, 1, 1), "70b": (4, 4, 5), "405b": (8, 9, 7)}[model]
    return Published(
        model=model,
        devices=devices,
        tensor=tensor,
        pipeline=pipeline,
        ring=2,
        sequences=sequences,
        interleaved=interleaved,
        step_s=step_s,
    )


def _gpt_oss(sequences: int, device_tokens_per_s: float) -> Published:
    return Published(
        model="gpt-oss-120b",
        devices=64,
        pipeline=4,
        expert=8,
        context=4096,
        sequences=sequences,
        step_s=sequences * 4096 / (64 * device_tokens_per_s),
    )


RUNS = (
    _llama("8b", 8, 128, 12.91),
    _llama("8b", 128, 2048, 13.10),
    _llama("70b", 64, 128, 14.72),
    _llama("70b", 2048, 4096, 14.98),
    _llama("405b", 576, 252, 17.20),
    _llama("405b", 2304, 1008, 17.62),
    _gpt_oss(1280, 5993),
    _gpt_oss(512, 5630),
)


def _shape(layers: int, hidden: int, heads: int, ffn: int) -> ModelConfig:
    """A Llama 3.1."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_hidden_size=ffn,
        vocab_size=128256,
        tied_embeddings=False,
    )


MODELS = {
    "8b": _shape(32, 4096, 32, 14336),
    "70b": _shape(80, 8192, 64, 28672),
    "405b": _shape(126, 16384, 128, 53248),
    # every second layer of the real one has a window, which makes the step a little shorter
    "gpt-oss-120b": ModelConfig(
        num_layers=36,
        hidden_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=201088,
        tied_embeddings=False,
        moe=MoeConfig(num_experts=128, top_k=4, ffn_hidden_size=2880),
    ),
}


def config_of(run: Published) -> RunConfig:
    """Our config of a run."""
    config = RunConfig(
        model=MODELS[run.model],
        parallel=ParallelConfig(tensor=run.tensor, pipeline=run.pipeline, expert=run.expert),
        data=DataConfig(sources={"any": SourceConfig(path="any")}, context_tokens=run.context),
        planner=PlannerConfig(capacity_tokens=-(-run.context // run.ring)),
    )
    return finalize(config, {"any": 1}, 1)


def predicted(run: Published) -> Figures:
    """The same step by our model of time, in the layout that was published."""
    config, device = config_of(run), device_of("h100")
    layout = Layout.of(config, run.devices)
    lengths = np.full(run.sequences, run.context)
    problem = step_problem(config, layout, lengths, step_cost(config, layout, device).cost)
    plan = plan_static_rings(problem, run.ring)
    return figures(config, layout, device, plan, problem)


def with_interleaving(run: Published, time: StepTime) -> float:
    """Seconds of a step whose pipeline fills as many times faster as that of the published run."""
    return time.total_s - time.fill_s * (1 - 1 / run.interleaved)


def bench_devices(words: Sequence[str]) -> None:
    """Predicted against published step times on H100."""
    parser = argparse.ArgumentParser(prog="bench.py devices", description=bench_devices.__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} too")
    arguments = parser.parse_args(words)
    rows = []
    print(f"{'model':>12} {'devices':>8} {'TP PP CP EP VP':>14} {'published':>10} "
          f"{'predicted':>10} {'error':>7} {'our 1F1B':>10}")  # fmt: skip
    for run in RUNS:
        time = predicted(run).time
        same_s = with_interleaving(run, time)
        layout = f"{run.tensor} {run.pipeline} {run.ring} {run.expert} {run.interleaved}"
        error = same_s / run.step_s - 1
        print(f"{run.model:>12} {run.devices:>8,} {layout:>14} {run.step_s:>8.2f} s "
              f"{same_s:>8.2f} s {error:>+7.1%} {time.total_s:>8.2f} s")  # fmt: skip
        rows.append({**asdict(run), "predicted_s": same_s, "error": error, "ours_s": time.total_s})
    print(f"published: {LLAMA_SOURCE}")
    print(f"           {GPT_OSS_SOURCE}")
    print("predicted: in that layout, with its interleaved pipeline; our 1F1B: without")
    if arguments.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
