"""Stall of an asynchronous save against a synchronous one, and what slows the steps after it.

    torchrun --nproc-per-node 2 tools/bench_checkpoint.py [--size 5M|50M] [--saves N] [--keep DIR]

Both kinds of save are taken in turn in one run, on the same model, after one warm-up save each.
The stall is the time in `save` and, for an asynchronous one, in the calls of `finalize` after it.
A step here is one matrix product loop of about the length of a training step on this machine,
which meets the background write on the same cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

from megascale.checkpoint.load import find, restore
from megascale.checkpoint.manifest import Position
from megascale.checkpoint.save import Saver, SaveResult
from megascale.config import RunConfig, finalize, parse_config
from megascale.model.build import build_model
from megascale.optim.build import build_optimizer
from megascale.runtime import distributed
from megascale.runtime.distributed import Ranks, broadcast_bytes

SIZES = {
    "5M": ["model.num_layers=6", "model.hidden_size=256", "model.num_heads=4"],
    "50M": ["model.num_layers=16", "model.hidden_size=512", "model.num_heads=8"],
}
BASE = "data: {sources: {text: {path: unused}}}\nmodel: {vocab_size: 257}\ndevice: auto"


def main() -> None:
    """Measure and print, as text and as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="5M")
    parser.add_argument("--saves", type=int, default=9, help="timed saves of each kind")
    parser.add_argument("--dir", help="folder to write in (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", help="a.b=c, as for megascale train")
    args = parser.parse_args()
    overrides = SIZES[args.size] + ["train.precision=fp32", *args.overrides]
    config = finalize(parse_config(BASE, overrides), {"text": 1}, 257)
    ranks = distributed.start(config)
    model = build_model(config, ranks)
    optimizer = build_optimizer(config, model)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        shared = broadcast_bytes(folder.encode(), ranks).decode()
        report = measure(config, ranks, model, optimizer, shared, args.saves)
        if ranks.rank == 0:
            show(args.size, report)
        distributed.dist.barrier()
    distributed.stop()


def measure(
    config: RunConfig, ranks: Ranks, model: Any, optimizer: Any, folder: str, saves: int
) -> dict[str, Any]:
    """Times in seconds, medians over `saves` of each kind taken in turn."""
    stalls: dict[str, list[float]] = {"sync": [], "async": []}
    alone, beside, background = [], [], []
    began = time.perf_counter()
    savers = {
        kind: Saver(folder, replace(config.checkpoint, async_save=kind == "async"), ranks)
        for kind in stalls
    }
    for saver in savers.values():
        saver.prepare(model, optimizer)
    prepared = time.perf_counter() - began
    for turn in range(2 * (saves + 1)):
        kind = "sync" if turn % 2 == 0 else "async"
        saver = savers[kind]
        distributed.dist.barrier()
        alone.append(step(ranks))
        distributed.dist.barrier()
        position = Position(turn + 1, 0, 1, "", {})
        began = time.perf_counter()
        ended = saver.save(position, model, optimizer)
        stall = time.perf_counter() - began
        if kind == "async":
            beside.append(step(ranks))
            result, finalizing = finish(saver, ranks.device)
            ended, stall = [result], stall + finalizing
            background.append(result.seconds)
        assert ended[0].error is None, ended[0]
        if turn >= 2:
            stalls[kind].append(stall)
    began = time.perf_counter()
    found = find(folder, "latest", ranks)
    assert found is not None
    verified = time.perf_counter() - began
    began = time.perf_counter()
    restore(found, model, optimizer, ranks)
    median = statistics.median
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ranks": ranks.world,
        "megabytes": ended[0].bytes / 1e6,
        "prepare_s": prepared,
        "sync_s": median(stalls["sync"]),
        "async_s": median(stalls["async"]),
        "background_s": median(background),
        "ratio": median(stalls["async"]) / median(stalls["sync"]),
        "step_alone_s": median(alone),
        "step_beside_write_s": median(beside),
        "verify_s": verified,
        "restore_s": time.perf_counter() - began,
    }


def finish(saver: Saver, device: torch.device) -> tuple[SaveResult, float]:
    """End a save as the step loop does; its result and the seconds spent in `finalize`."""
    spent = 0.0
    while True:
        writing = torch.tensor(not saver.pending_done(), dtype=torch.float32, device=device)
        distributed.dist.all_reduce(writing)
        if writing:
            time.sleep(0.001)
            continue
        began = time.perf_counter()
        result = saver.finalize()
        spent += time.perf_counter() - began
        if result is not None:
            return result, spent


def step(ranks: Ranks) -> float:
    """Seconds of a step-like load: products of matrices, and one all-reduce."""
    matrix = torch.ones(512, 512, device=ranks.device) / 512
    began = time.perf_counter()
    for _ in range(40):
        matrix = matrix @ matrix
    distributed.dist.all_reduce(matrix)
    return time.perf_counter() - began


def show(size: str, report: dict[str, Any]) -> None:
    """Print the report."""
    for name, value in report.items():
        print(f"{name:>22}  {value:.4f}" if isinstance(value, float) else f"{name:>22}  {value}")
    verdict = "holds" if report["ratio"] <= 0.1 else "does not hold"
    print(f"stall of an async save <= 0.1x of a sync one: {report['ratio']:.3f}, {verdict}")
    print(json.dumps({"benchmark": f"checkpoint {size}", **report}))


if __name__ == "__main__":
    main()
