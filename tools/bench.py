"""Benchmarks, each a ratio against a named peer in one run: `python tools/bench.py NAME`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

TOOLS = Path(__file__).parent
LONGER = "{tokens: 250000, precision: fp32, threads: 1}"


def main() -> int:
    """Run one benchmark."""
    purposes = {name: bench.__doc__ for name, bench in BENCHMARKS.items()}
    purposes |= {name: f"{purpose} Has options." for name, purpose in WITH_OPTIONS.items()}
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<10} {purpose}" for name, purpose in purposes.items()),
    )
    parser.add_argument("name", choices=purposes)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="try: bench.py planner --help")
    arguments = parser.parse_args()
    if arguments.name in WITH_OPTIONS:
        bench = f"bench_{arguments.name}"
        getattr(import_module(bench), bench)(arguments.options)
    elif arguments.options:
        parser.error(f"{arguments.name} takes no options, got {' '.join(arguments.options)}")
    else:
        BENCHMARKS[arguments.name]()
    return 0


def step() -> None:
    """Our whole step against a bare megatron-core loop and a plain PyTorch GPT."""
    from megascale.runtime import distributed

    distributed.prepare_device("auto")  # before megatron-core is imported
    from bench_step import bench_step

    bench_step()


def save() -> None:
    """Stall of an asynchronous save against a synchronous one, 2 ranks."""
    script = str(TOOLS / "bench_checkpoint.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for size in ("5M", "50M"):
        subprocess.run([*launch, "--nproc-per-node", "2", script, "--size", size], check=True)


def data() -> None:
    """Lengths of a 32M-token batch from 1M and 10M documents: time and private memory."""
    from bench_data import bench_batches

    bench_batches()


def resume() -> None:
    """Twenty SIGKILLs at random moments on 2 ranks: is the joined curve bit-equal?"""
    sys.path.insert(0, str(TOOLS.parent / "tests"))
    from crash_drill import compare, curve, drill, finish, start
    from tiny_corpus import tiny_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        longer = tiny_config(folder / "a", checkpoint="{save_every_steps: 1}", train=LONGER)
        print(drill(longer, folder / "drill", kills=20))
        config = tiny_config(folder / "b")
        finish(start(config, folder / "calm", 2))
        for world in (1, 2, 3, 4):
            run_dir = folder / str(world)
            finish(start(config, run_dir, 2, "train.stop_after_steps=10"))
            finish(start(config, run_dir, world, "--resume", "latest"))
            result = compare(curve(folder / "calm"), curve(run_dir))
            print(f"stopped at step 10 on 2 ranks, resumed on {world}: {result}")


def simulate() -> None:
    """ByteScale's table in the simulator: its stages over static context parallelism, and ours."""
    from bench_simulate import bench_simulate

    bench_simulate()


BENCHMARKS: dict[str, Callable[[], None]] = {
    "step": step,
    "save": save,
    "data": data,
    "resume": resume,
    "simulate": simulate,
}
WITH_OPTIONS = {
    "devices": "Predicted against published step times on H100.",
    "planner": "Our plans against every peer's by the neutral judge, and the time to plan.",
    "hdp": "Training under our plans and under static ones on CPU ranks, end to end.",
    "pipeline": "Chunked pipelines on CPU ranks: against whole micro-batches and predictions.",
    "balance": "Ways to know the batch's use of experts: how near to exact, and what they cost.",
    "estimates": "Estimates of the batch's use of experts, over ranks, batches and steps.",
    "infowindow": "Equal-Info Windows against tokenizers in use: speed, exactness, ratios.",
    "slow_rank": "One of two ranks is slow: steps with measured speeds of ranks and without.",
    "store": "Operations on the store for setting up groups, by number of ranks.",
    "overhead": "Step times with heartbeats and timers of ranks on and off.",
    "gpu": "Draws the rows of tools/gpu.sh or tools/gpus.sh.",
}
"""What functions `bench_NAME` of modules of that name do."""

if __name__ == "__main__":
    sys.exit(main())
