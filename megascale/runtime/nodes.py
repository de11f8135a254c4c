"""All ranks of a job tested at once.

Every rank tests its device; then every two ranks of a node, and every two nodes, exchange data.
A rank meets each other once, in as many rounds as it has others to meet (a round-robin
tournament), so the time grows with the number of nodes and not with that of pairs. What ranks find
out goes to rank 0 over the store, so one that hangs is missed and named, and holds nobody up.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from megascale.errors import UserError
from megascale.runtime.environment import world_from_environment
from megascale.runtime.placement import meetings, members_of, node_name
from megascale.runtime.self_test import cpu, cuda, examine_device
from megascale.runtime.verdict import LEAST, Report, Verdict, judge

if TYPE_CHECKING:
    import torch

PAYLOAD_BYTES = {"cpu": 1 << 22, "cuda": 1 << 27}
REPEATS = 5
"""Of what is sent; the best counts, since anything may come between."""
LEAVE_S = 5.0


@dataclass(frozen=True)
class Options:
    """How to test."""

    seconds: float = 1.0
    """Of multiplying, on every rank."""
    memory_share: float = 0.5
    """Of a CUDA device's free memory that is filled and read back."""
    timeout_s: float = 120.0
    """For a rank that says nothing."""
    payload_bytes: int | None = None
    """Of an exchange; None: what suits the device."""


def run_rank(options: Options, told: Mapping[str, float], least: float | None) -> Verdict | None:
    """Take part as the rank that the environment names; the verdict on rank 0, None on others.

    Raises UserError where the ranks do not meet at all.
    """
    import torch

    rank, world, local = world_from_environment()
    store = _store(rank, options.timeout_s)
    board = _Board(store, rank, world)
    board.say("host", node_name())
    on_cuda = torch.cuda.is_available()
    device = cuda(local, options.memory_share) if on_cuda else cpu()
    hosts = board.begin_together(options.timeout_s)
    board.say("alone", asdict(examine_device(device, options.seconds)))
    alone: dict[int, Any] = {}
    if rank == 0:
        alone = board.hear("alone", options.timeout_s)
        board.decide([hosts[one] for one in range(world)] if len(alone) == world else None)
    together: dict[int, Any] = {}
    decided = board.decided(2 * options.timeout_s)
    if decided is not None:
        backend = "nccl" if on_cuda else "gloo"
        board.say("together", _together(backend, local, store, rank, decided, options))
        together = board.hear("together", 2 * options.timeout_s) if rank == 0 else {}
    board.leave()
    if rank != 0:
        return None
    reports = [
        Report(
            rank=one,
            host=hosts[one],
            faults=tuple(alone[one]["faults"] + together.get(one, {}).get("faults", [])),
            figures=alone[one]["figures"] | together.get(one, {}).get("figures", {}),
            links={int(k): v for k, v in together.get(one, {}).get("links", {}).items()},
            lost=together.get(one, {}).get("lost"),
        )
        for one in (together if decided is not None else alone)
    ]
    return judge(reports, hosts, least or LEAST["cuda" if on_cuda else "cpu"], told)


def _store(rank: int, timeout_s: float) -> Any:
    """The store at MASTER_ADDR; unlike torch's own rendezvous it does not wait for all ranks."""
    from torch.distributed import TCPStore

    env = os.environ
    held = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            is_master=rank == 0 and not held,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the ranks do not meet: {_one_line(error)}") from None


class _Board:
    """What the ranks tell each other without waiting for each other."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        from torch.distributed import PrefixStore

        self._store, self._rank, self._world = PrefixStore("nodes", store), rank, world

    def say(self, topic: str, value: object) -> None:
        self._store.set(f"{topic}/{self._rank}", json.dumps(value))

    def hear(self, topic: str, limit_s: float, kind: type = dict) -> dict[int, Any]:
        """What ranks have said, waiting for each until all had so many seconds together.

        A rank that says what is not of this `kind` has said nothing.
        """
        end, heard = time.monotonic() + limit_s, {}
        for rank in range(self._world):
            left = timedelta(seconds=max(0.01, end - time.monotonic()))
            with contextlib.suppress(RuntimeError, ValueError):
                self._store.wait([f"{topic}/{rank}"], left)
                said = json.loads(self._store.get(f"{topic}/{rank}"))
                if isinstance(said, kind):
                    heard[rank] = said
        return heard

    def begin_together(self, limit_s: float) -> dict[int, str]:
        """Wait until all ranks are here, or so long; on rank 0, where each is."""
        hosts: dict[int, str] = {}
        if self._rank == 0:
            hosts = dict.fromkeys(range(self._world), "?") | self.hear("host", limit_s, str)
            self._store.set("begin", "")
        with contextlib.suppress(RuntimeError):
            self._store.wait(["begin"], timedelta(seconds=2 * limit_s))
        return hosts

    def decide(self, hosts: list[str] | None) -> None:
        """Tell all who is where, or with None that they are to leave."""
        self._store.set("decided", json.dumps(hosts))

    def decided(self, limit_s: float) -> list[str] | None:
        """What rank 0 has decided; None also where it says nothing."""
        try:
            self._store.wait(["decided"], timedelta(seconds=limit_s))
            hosts: list[str] | None = json.loads(self._store.get("decided"))
        except RuntimeError:
            return None
        return hosts

    def leave(self) -> None:
        """Leave; rank 0, which may hold the store, waits a little for the others."""
        end = time.monotonic() + LEAVE_S
        with contextlib.suppress(RuntimeError):
            self._store.add("left", 1)
            while self._rank == 0 and self._store.add("left", 0) < self._world:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)


def _together(
    backend: str, local: int, store: Any, rank: int, hosts: Sequence[str], options: Options
) -> dict[str, Any]:
    """What one rank finds out with the others; `lost` says where it came to nothing."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    size = options.payload_bytes or PAYLOAD_BYTES[device.type]
    found: dict[str, Any] = {"faults": [], "figures": {}, "links": {}, "lost": None}
    limit = timedelta(seconds=options.timeout_s)
    doing = "joining the others"
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=len(hosts), timeout=limit
        )
        dist.all_reduce(torch.zeros(1, device=device))  # on NCCL never begin with an exchange
        for kind, opponent in meetings(hosts):
            other = opponent[rank]
            if other != rank:
                doing = f"the exchange with node {hosts[other]} rank {other}"
                _exchange(rank, other, size, device, found)
                links = [v for k, v in found["links"].items() if _kind(hosts, rank, k) == kind]
                found["figures"][kind] = median(links)
        own = next(ranks for ranks in members_of(hosts) if rank in ranks)
        for name, ranks in (("node-all-reduce", own), ("all-reduce", list(range(len(hosts))))):
            if len(ranks) > 1:
                doing = f"the {name}"
                _all_reduce(name, ranks, size, device, found)
        dist.destroy_process_group()
    except RuntimeError as error:
        found["lost"] = f"{doing} failed: {_one_line(error)}"
    return found


def _kind(hosts: Sequence[str], one: int, other: int) -> str:
    return "in-node" if hosts[one] == hosts[other] else "between-nodes"


def _exchange(
    rank: int, other: int, size: int, device: torch.device, found: dict[str, Any]
) -> None:
    """Send to and receive from another rank at once."""
    import torch
    import torch.distributed as dist

    words = torch.arange(max(1, size // 8), dtype=torch.int64, device=device)
    sent, got = words * (2 * rank + 1), torch.zeros_like(words)

    def swap(mine: torch.Tensor, theirs: torch.Tensor) -> None:
        both = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()

    swap(sent[:1], got[:1])  # wait for the other, and connect
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        swap(sent, got)
        seconds.append(time.perf_counter() - began)
    if not torch.equal(got, words * (2 * other + 1)):
        found["faults"].append(f"what rank {other} sent arrived changed")
    found["links"][other] = sent.nbytes / min(seconds)


def _all_reduce(
    name: str, ranks: list[int], size: int, device: torch.device, found: dict[str, Any]
) -> None:
    """Sum over ranks; the bandwidth is that of a ring, 2 (n - 1) / n of the bytes."""
    import torch
    import torch.distributed as dist

    group = dist.new_group(ranks, use_local_synchronization=True)
    mine, n = dist.get_rank(), len(ranks)
    seconds = []
    for _ in range(REPEATS + 1):  # the first connects
        summed = torch.full((max(1, size // 4),), 1.0 + mine % 16, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(summed, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if not bool((summed == sum(1 + one % 16 for one in ranks)).all()):
        found["faults"].append(f"the {name} gave a wrong sum")
    found["figures"][name] = 2 * (n - 1) / n * summed.nbytes / min(seconds[1:])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
