"""Benchmarks of the data path. Run with `python tools/bench_data.py`."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megascale.config import DataConfig, SourceConfig, StageConfig
from megascale.corpus.batches import Cursor, GlobalBatches

BATCH_TOKENS = 32_000_000
CONTEXT_TOKENS = 32_768
NUM_STEPS = 15


@dataclass(frozen=True)
class LengthsOnly:
    """A shard of which only the lengths exist, memory-mapped."""

    lengths: np.ndarray
    prefix: str


def bench_batches() -> None:
    """Print the time of a 32M-token batch's lengths, and the private memory it takes to make it.

    Document lengths are lognormal (median 400 tokens, mean about 1200), like web text.
    """
    with tempfile.TemporaryDirectory() as folder:
        for num_documents in (1_000_000, 10_000_000):
            path = Path(folder) / f"{num_documents}.npy"
            lengths = np.random.default_rng(1).lognormal(6.0, 1.5, num_documents)
            np.save(path, np.clip(lengths, 1, 2**20).astype(np.int32))
            del lengths
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                first_s, median_s, sequences, grown = pool.apply(_measure, (str(path),))
            print(
                f"batches of {BATCH_TOKENS:,} tokens from {num_documents:>10,} documents: "
                f"{median_s * 1e3:.1f} ms per step (median of {NUM_STEPS}, "
                f"{sequences:,} sequences), set-up {first_s * 1e3:.0f} ms, "
                f"private memory +{grown / 2**20:.1f} MiB"
            )


def _measure(path: str) -> tuple[float, float, int, int]:
    before = _private_bytes()
    begin = time.perf_counter()
    shard = LengthsOnly(np.load(path, mmap_mode="r"), path)
    data = DataConfig(
        sources={"web": SourceConfig(path=path)},
        stages=(StageConfig(blend={"web": 1.0}),),
        context_tokens=CONTEXT_TOKENS,
        global_batch_tokens=BATCH_TOKENS,
    )
    batches, cursor = GlobalBatches(data, {"web": shard}, seed=1), Cursor()
    first_s, seconds = time.perf_counter() - begin, []
    for _ in range(NUM_STEPS):
        begin = time.perf_counter()
        batch, cursor = batches.next(cursor)
        seconds.append(time.perf_counter() - begin)
    return first_s, statistics.median(seconds), batch.num_sequences, _private_bytes() - before


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; run this on Linux")


if __name__ == "__main__":
    bench_batches()
