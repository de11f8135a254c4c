"""Starting and stopping the ranks of a run: device, process groups, threads, seeds."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megascale.config import Layout, RunConfig, validate_on_cuda
from megascale.errors import RankError, UserError
from megascale.runtime import cuda
from megascale.runtime.environment import meeting_point, world_from_environment

NAME_BYTES = 64
MOST_CORES = 4096
"""Of a node, that are compared."""
TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class HdpAxis:
    """The ranks that take different sequences of the same model part."""

    ranks: tuple[int, ...]
    """Global torch rank of each position on the axis."""
    group: dist.ProcessGroup
    """All of them; every ring sends and receives over it. Gradients are reduced over another
    group of the same ranks, so the two never wait for each other."""

    @staticmethod
    def of(group: dist.ProcessGroup | None = None) -> HdpAxis:
        """The axis of all ranks of a process group, in its order; default: of a new group of all.

        Every rank calls it. The group should be used for nothing else.
        """
        group = dist.new_group() if group is None else group
        return HdpAxis(tuple(dist.get_process_group_ranks(group)), group)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the ranks of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    backend: str
    layout: Layout
    hdp_rank: int
    """Position on the HDP axis; ranks that share it hold the same sequences."""
    axis: HdpAxis
    """The HDP axis that this rank is on."""
    replicas: tuple[dist.ProcessGroup, ...]
    """Groups whose ranks hold the same weights: those of the axis the same dense ones, those that
    expert parallelism leaves the same experts."""
    is_first_stage: bool
    """Holds the embedding."""
    is_last_stage: bool
    """Holds the output head, and so the loss."""
    reports_loss: bool
    """The one rank of its HDP position whose loss sums are counted."""
    control: dist.ProcessGroup
    """All ranks over gloo, for plans and other bytes in host memory."""
    why: str
    """Why this device was taken, to be said aloud."""


def choose_device(wanted: str) -> tuple[str, str]:
    """The device type ('cuda' or 'cpu') and the reason for it.

    Raises UserError when `device: cuda` is asked for on a machine without CUDA.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda, but torch sees no CUDA device; set device=cpu or auto")
    if wanted == "cpu" and torch.cuda.is_available():
        raise UserError(
            "device = cpu on a machine with CUDA: start with CUDA_VISIBLE_DEVICES= (empty) too"
        )
    if torch.cuda.is_available():
        return "cuda", f"{torch.cuda.device_count()} CUDA device(s) found"
    return "cpu", "no CUDA device found" if wanted == "auto" else "asked for by device = cpu"


def prepare_device(wanted: str) -> tuple[str, str]:
    """Choose the device and make megatron-core ready for it; before its first import.

    Returns what `choose_device` does, and raises what it raises.
    """
    kind, why = choose_device(wanted)
    _quiet_megatron()
    if kind == "cpu":
        from megascale.runtime import cpu

        cpu.install()
    else:
        cuda.prepare()
    return kind, why


def start(config: RunConfig) -> Ranks:
    """Join the other ranks, lay out the groups of TP, PP, EP and HDP, and warm each one.

    A group is warmed with one collective before any point-to-point use, because on NCCL a
    point-to-point exchange must not be a group's first operation.
    Raises UserError when the layout does not fit the number of ranks, RankError when the ranks
    cannot meet.
    """
    rank, world, local_rank = world_from_environment()
    layout = Layout.of(config, world)
    kind, why = prepare_device(config.device)
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        validate_on_cuda(config)
        torch.cuda.set_device(device)
        if config.train.deterministic:
            _joined.deterministic = torch.are_deterministic_algorithms_enabled()
            cuda.compute_deterministically()
        else:
            _use_fastest_attention(config, device)
    else:
        _joined.threads = torch.get_num_threads()
        torch.set_num_threads(config.train.threads or _threads_per_rank())
    _join(rank, world, "nccl" if kind == "cuda" else "gloo")
    control = dist.group.WORLD if kind == "cpu" else dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert control is not None, "the ranks have met"
    _make_groups(layout)
    seed_everything(config.seed)
    return _describe(layout, rank, local_rank, device, control, why)


def _use_fastest_attention(config: RunConfig, device: torch.device) -> None:
    model = config.model
    assert model.head_dim is not None  # it is finalized
    cuda.use_fastest_attention(device, model.head_dim, model.sliding_window is not None)


def device_name(device: torch.device) -> str:
    """The model of a GPU; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU that tensors of this process take; 0 on CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def stop() -> None:
    """Leave the groups; safe to call when they were never made.

    A default process group that the caller had made before `start` stays. torch has as many threads
    as before, and is as deterministic.
    """
    if _joined.threads is not None:
        torch.set_num_threads(_joined.threads)
        _joined.threads = None
    if _joined.deterministic is not None:
        torch.use_deterministic_algorithms(_joined.deterministic)
        _joined.deterministic = None
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if _joined.open:
        _joined.open = False
        dist.destroy_process_group()
        sys.excepthook = _joined.excepthook  # torch puts a prefix before it, each time another


def seed_everything(seed: int) -> None:
    """Seed torch and megatron-core's tracked random states.

    Training draws no random number (no dropout, weights by name, data by cursor), so this is
    all the random state a checkpoint needs.
    """
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def broadcast_bytes(payload: bytes | None, ranks: Ranks, source: int = 0) -> bytes:
    """The same bytes on every rank; only `source` needs to give them."""
    if ranks.world == 1:
        assert payload is not None
        return payload
    size = torch.tensor([len(payload) if payload is not None else 0])
    dist.broadcast(size, source, group=ranks.control)
    if not int(size):
        return b""
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if ranks.rank == source:
        buffer = torch.frombuffer(bytearray(payload or b""), dtype=torch.uint8)
    dist.broadcast(buffer, source, group=ranks.control)
    return buffer.numpy().tobytes()


def begin_broadcast(
    payload: bytes | None, size: int, ranks: Ranks, source: int = 0
) -> Callable[[], bytes]:
    """Begin to send `size` bytes; what is returned waits for them, in any thread.

    They travel while the caller does other things. Every rank must begin it at the same place
    in the order of what it does on the control group. Only `source` needs to give `payload`.
    """
    if ranks.world == 1:
        return lambda: payload or b""
    buffer = torch.empty(size, dtype=torch.uint8)
    if ranks.rank == source:
        buffer = torch.frombuffer(bytearray(payload or b""), dtype=torch.uint8)
    work = dist.broadcast(buffer, source, group=ranks.control, async_op=True)

    def wait() -> bytes:
        work.wait()
        return buffer.numpy().tobytes()

    return wait


def gather_arrays(mine: NDArray[Any], ranks: Ranks) -> NDArray[Any] | None:
    """Arrays of one shape and type, stacked in the order of ranks, on rank 0; None on others."""
    if ranks.world == 1:
        return mine[None]
    sent = torch.from_numpy(mine)
    if ranks.rank:
        dist.gather(sent, None, dst=0, group=ranks.control)
        return None
    told = [torch.empty_like(sent) for _ in range(ranks.world)]
    dist.gather(sent, told, dst=0, group=ranks.control)
    return torch.stack(told).numpy()


def node_names(ranks: Ranks) -> list[str]:
    """The name of each rank's machine, on rank 0; empty on others."""
    name = np.zeros(NAME_BYTES, dtype=np.uint8)
    mine = socket.gethostname().encode()[:NAME_BYTES]
    name[: len(mine)] = np.frombuffer(mine, dtype=np.uint8)
    names = gather_arrays(name, ranks)
    return [] if names is None else [one.tobytes().rstrip(b"\0").decode() for one in names]


def cores_are_shared(ranks: Ranks) -> bool:
    """Whether ranks of a node may run on the same cores, so that how long each takes says little
    about itself; on rank 0, False on others and with CUDA. For all ranks to call."""
    if ranks.device.type != "cpu":
        return False
    mine = np.zeros(MOST_CORES, dtype=np.uint8)
    mine[[core for core in os.sched_getaffinity(0) if core < MOST_CORES]] = 1
    names, cores_RC = node_names(ranks), gather_arrays(mine, ranks)
    return cores_RC is not None and any_overlap(names, cores_RC)


def any_overlap(names: Sequence[str], cores_RC: NDArray[Any]) -> bool:
    """Whether two ranks with the same name of a node have a core C in common."""
    nodes = [[rank for rank, name in enumerate(names) if name == one] for one in set(names)]
    return any(int(cores_RC[members].sum(axis=0).max()) > 1 for members in nodes)


def all_agree(fine: bool, ranks: Ranks) -> bool:
    """Whether `fine` holds on every rank."""
    flag = torch.tensor([1 if fine else 0])
    if ranks.world > 1:
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=ranks.control)
    return bool(flag)


def patient(ranks: Ranks) -> Ranks:
    """The same ranks with a `control` that waits for days; for all of them to call."""
    if ranks.world == 1:
        return ranks
    return replace(ranks, control=dist.new_group(backend="gloo", timeout=PATIENCE))


class _Joined:
    """How often this process has joined the others of its meeting point, and through what; and how
    the process was before.

    The store of a meeting point stays for the whole process, and each time has its own names in
    it: the addresses of the last time must not be taken for those of this one by a rank that
    comes back while others still leave, nor under torchrun, whose store outlives all of them.
    """

    def __init__(self) -> None:
        self.open = False
        self.excepthook = sys.excepthook
        self.threads: int | None = None
        self.deterministic: bool | None = None
        self._where: tuple[object, ...] | None = None
        self._store: dist.Store | None = None
        self._times = 0

    def store(self, rank: int, world: int) -> dist.Store:
        """The store to join the others by now; for every rank to call as often as the others."""
        if world == 1 and "MASTER_ADDR" not in os.environ:
            return dist.HashStore()
        where = (meeting_point(), rank, world)
        if self._store is None or where != self._where:
            self._where, self._store, self._times = where, None, 0
            self._store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=TIMEOUT))
        self._times += 1
        return dist.PrefixStore(f"megascale-{self._times}", self._store)


_joined = _Joined()


def _join(rank: int, world: int, backend: str) -> None:
    if dist.is_initialized():
        _require_agreement(rank, world)
        return
    _joined.excepthook = sys.excepthook
    # n ranks of a gloo group then ask the store for all addresses n times, not n^2 times
    os.environ.setdefault("GLOO_ENABLE_STORE_V2_API", "1")
    try:
        store = _joined.store(rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        _joined.open = True
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RankError(
            f"rank {rank} of {world} cannot meet the others at {meeting_point()} (MASTER_ADDR, "
            f"MASTER_PORT): {reason}"
        ) from None


def _require_agreement(rank: int, world: int) -> None:
    """Raise RankError where the caller's process group says otherwise than the environment."""
    found = dist.get_rank(), dist.get_world_size()
    if found != (rank, world):
        raise RankError(
            f"this process is rank {found[0]} of {found[1]} of a process group, and rank {rank} of "
            f"{world} by the environment; start it with torchrun, or set RANK, LOCAL_RANK, "
            "WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun would"
        )


def _make_groups(layout: Layout) -> None:
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        raise RankError(
            "megatron-core's groups exist already in this process; a run makes its own: call "
            "megatron.core.parallel_state.destroy_model_parallel() first"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        context_parallel_size=1,
    )
    token = torch.zeros(1, device=torch.cuda.current_device())
    for group in (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
        dist.group.WORLD,
    ):
        dist.all_reduce(token, group=group)


def _describe(
    layout: Layout,
    rank: int,
    local_rank: int,
    device: torch.device,
    control: dist.ProcessGroup,
    why: str,
) -> Ranks:
    from megatron.core import parallel_state as state

    last = state.is_pipeline_last_stage()
    hdp_group = state.get_data_parallel_group()
    return Ranks(
        rank=rank,
        world=layout.world,
        local_rank=local_rank,
        device=device,
        backend=dist.get_backend(),
        layout=layout,
        hdp_rank=state.get_data_parallel_rank(),
        axis=HdpAxis.of(hdp_group),
        replicas=(hdp_group, state.get_expert_data_parallel_group()),
        is_first_stage=state.is_pipeline_first_stage(),
        is_last_stage=last,
        reports_loss=last and state.get_tensor_model_parallel_rank() == 0,
        control=control,
        why=f"{why}; host {socket.gethostname()}",
    )


def _threads_per_rank() -> int:
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local_world)


def _quiet_megatron() -> None:
    """megatron-core warns of every optional package at import; `doctor` lists them instead.

    Newer versions import torch's compiler of extensions, which logs that there is no CUDA.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|apex).*")
