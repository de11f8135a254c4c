"""How many operations on the store setting up groups takes, for 4 to 64 ranks, and what follows.

Gloo's part is counted: real groups of threads over a store that counts. So is the rest of what a
run does: every rank's groups, as our runtime asks megatron-core for them, are made in one process
with torch's fake backend, which connects nobody. (A test holds the sum against real processes.)
What is said of 12,288 ranks is that line, the groups of one such rank, and how fast one TCPStore
answers here. NCCL's groups are not counted: by torch's source one operation for each rank of each.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

RANKS = (4, 8, 16, 32, 64)
MANY = 12_288
BATCHED = "GLOO_ENABLE_STORE_V2_API"


class CountingStore(dist.Store):
    """A store that counts the requests that a server would get; waits count as one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner, self._lock = inner, threading.Lock()
        self.counts: Counter[str] = Counter()

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def set(self, key: str, value: Any) -> None:
        """Count and pass on; so do all that follow."""
        self._count("set")
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        """See `set`."""
        self._count("get")
        return self._inner.get(key)

    def add(self, key: str, value: int) -> int:
        """See `set`."""
        self._count("add")
        return self._inner.add(key, value)

    def check(self, keys: list[str]) -> bool:
        """See `set`."""
        self._count("check")
        return self._inner.check(keys)

    def wait(self, *given: Any) -> None:
        """See `set`."""
        self._count("wait")
        self._inner.wait(*given)

    def compare_set(self, *given: Any) -> bytes:
        """See `set`."""
        self._count("compare_set")
        return self._inner.compare_set(*given)

    def delete_key(self, key: str) -> bool:
        """See `set`."""
        self._count("delete_key")
        return self._inner.delete_key(key)

    def append(self, *given: Any) -> None:
        """See `set`."""
        self._count("append")
        self._inner.append(*given)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """See `set`."""
        self._count("multi_get")
        return self._inner.multi_get(keys)

    def multi_set(self, *given: Any) -> None:
        """See `set`."""
        self._count("multi_set")
        self._inner.multi_set(*given)

    def has_extended_api(self) -> bool:
        """It has; no request."""
        return True

    def set_timeout(self, timeout: timedelta) -> None:
        """No request."""
        self._inner.set_timeout(timeout)


def gloo_operations(num_ranks: int) -> int:
    """What connecting the ranks of one gloo group takes, counted over threads."""
    store = CountingStore(dist.HashStore())
    groups: list[Any] = [None] * num_ranks

    def join(rank: int) -> None:
        shared = dist.PrefixStore("group", store)
        groups[rank] = dist.ProcessGroupGloo(shared, rank, num_ranks, timedelta(seconds=60))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(groups)
    return sum(store.counts.values())


def groups_of(rank: int, num_ranks: int) -> tuple[list[int], int, float]:
    """(sizes of the groups of a rank that our runtime makes, other operations, seconds)."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend

    from megascale.config import Layout
    from megascale.runtime import distributed

    store, sizes = CountingStore(dist.HashStore()), [num_ranks]
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=store)
    honest = dist.new_group

    def new_group(ranks: Sequence[int] | None = None, *given: Any, **options: Any) -> Any:
        if ranks is None or rank in ranks:
            sizes.append(num_ranks if ranks is None else len(ranks))
        options["backend"] = "fake"  # some are asked for over gloo
        return honest(ranks, *given, **options)

    began = time.perf_counter()
    try:
        with mock.patch.object(dist, "new_group", new_group):
            distributed._make_groups(Layout(num_ranks, 1, 1, 1, num_ranks))
        return sizes, sum(store.counts.values()), time.perf_counter() - began
    finally:
        distributed.stop()
        dist.destroy_process_group()


def run_operations(num_ranks: int) -> int:
    """Operations of all ranks of a run on its store, from joining to the last group."""
    sizes, total = Counter[int](), 0
    for rank in range(num_ranks):
        own, other, _ = groups_of(rank, num_ranks)
        sizes.update(own)
        total += other
    return total + sum(gloo_operations(n) * ranks // n for n, ranks in sizes.items())


def count_run() -> int:
    """Operations of this process, a real rank, while it joins the others and makes its groups."""
    from megascale.config import RunConfig
    from megascale.runtime import distributed

    stores: list[CountingStore] = []
    honest = dist.rendezvous

    def rendezvous(*given: Any, **options: Any) -> Any:
        for store, rank, world in honest(*given, **options):
            stores.append(CountingStore(store))
            yield stores[-1], rank, world

    with mock.patch.object(dist, "rendezvous", rendezvous):
        distributed.start(RunConfig())
    return sum(stores[0].counts.values())


def answers_per_s(seconds: float = 1.0, clients: int = 4) -> float:
    """Requests that a TCPStore of this machine answers, one after the other for each client."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    counts = [0] * clients

    def ask(client: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            store.add(f"key{client}", 1)  # which waits for an answer
            counts[client] += 1

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def bench_store(options: Sequence[str] = ()) -> None:
    """Count, print, and extrapolate."""
    parser = argparse.ArgumentParser(prog="bench.py store", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--most", type=int, default=MANY, help="ranks of the largest run")
    args = parser.parse_args(options)
    from megascale.runtime import distributed

    distributed.prepare_device("auto")
    counted = {}
    for batched in (True, False):
        os.environ[BATCHED] = str(int(batched))
        counted[batched] = {n: run_operations(n) for n in RANKS}
        each = ", ".join(f"{n}: {total:,}" for n, total in counted[batched].items())
        kind = "batched (ours)" if batched else "gloo's default"
        print(f"operations of all ranks together, {kind}: {each}", flush=True)
    per_rank = counted[True][RANKS[-1]] / RANKS[-1]
    made_s = {n: groups_of(1, n)[2] for n in (64, 1024, args.most)}
    rate = answers_per_s()
    for n, seconds in made_s.items():
        print(f"making its groups, connections apart, takes a rank of {n:,} {seconds:.2f} s")
    store_s = per_rank * args.most / rate
    print(
        f"{args.most:,} ranks: {per_rank * args.most:,.0f} operations, {store_s:.0f} s at "
        f"{rate:,.0f} answers per second of one store with four clients (MegaScale, 2048 GPUs: "
        "1047 s, with Redis 361 s, with O(n) barriers below 5 s)"
    )
    if args.json:
        result = {
            "operations": {("batched" if b else "default"): one for b, one in counted.items()},
            "per_rank": per_rank,
            "make_groups_s": made_s,
            "answers_per_s": rate,
            "store_s": {args.most: store_s},
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
