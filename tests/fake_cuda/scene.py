"""The real model, step and optimizer of a config, on the fake device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fake_device
import numpy as np
import torch
import torch.distributed as dist
from counting import Device
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

CONFIG = """
model: {num_layers: 2, hidden_size: 4096, num_heads: 32, num_kv_heads: 8, ffn_hidden_size: 14336,
        vocab_size: 128256}
data: {sources: {random: {path: none}}, context_tokens: 8192, global_batch_tokens: 65536}
planner: {capacity_tokens: 8192}
"""
"""Two layers of an 8B model, 8,192 tokens to a micro-batch."""
MOE = (
    "model={num_layers: 2, hidden_size: 2048, num_heads: 16, num_kv_heads: 4, head_dim: 128, "
    "vocab_size: 128256, moe: {num_experts: 8, top_k: 2, ffn_hidden_size: 1024}}"
)


@dataclass
class Scene:
    """A run on one rank of the fake device."""

    config: Any
    learner: Any
    device: Device

    def read(self, *rings: tuple[Sequence[int], Sequence[int]]) -> list[Any]:
        """This rank's micro-batches of a plan with these rings, each (ranks, lengths), as the
        reader of a run makes them."""
        from megascale.planner import Ring, StepPlan
        from megascale.training.reading import reader_of

        ranks, lengths, planned = self.learner.ranks, [], []
        for index, (members, tokens) in enumerate(rings):
            mine = tuple(range(len(lengths), len(lengths) + len(tokens)))
            planned.append(Ring(index, tuple(members), mine, 0.0, index))
            lengths += tokens
        plan = StepPlan(ranks.layout.hdp, "free", 1 << 30, 1.0, 1.0, 0.0, tuple(planned))
        zeros = np.zeros(len(lengths), np.int64)
        batch = SimpleNamespace(
            source=zeros, document=zeros, start=zeros, length=zeros + np.array(lengths)
        )
        return list(reader_of(self.config, ranks, [_Source()]).read(plan, batch))

    def step(self, micro_batches: Sequence[Any]) -> Any:
        """A training step of a run that has these micro-batches on this rank.

        Every number that the step reads from the device is 1, and so are the tokens that it ran.
        """
        from megascale.training.step import train_step

        return train_step(self.learner, list(micro_batches), len(micro_batches), 1, 1)


class _Source:
    """Tokens of a corpus."""

    first_id = 0

    def read(self, document: int, start: int, length: int) -> Any:
        """Always the same ones."""
        from megascale.mesh.packing import TokenSequence

        return TokenSequence(np.zeros(length, np.int64), np.zeros(length, np.int64))


@contextlib.contextmanager
def scene(*overrides: str, world: int = 1, rank: int = 0) -> Iterator[Scene]:
    """A run with these options, on rank `rank` of `world`."""
    from megascale.config import finalize, parse_config
    from megascale.mesh import offload, transfer

    config = finalize(parse_config(CONFIG, overrides), {"random": 10**9}, 128256)
    top_k = config.model.moe.top_k if config.model.moe else 1
    device = Device(lambda mask: mask.shape[-1] * top_k)
    with contextlib.ExitStack() as leave:
        leave.enter_context(_ranks(world, rank))
        leave.enter_context(fake_device.fake_tensors())
        leave.enter_context(device)
        leave.enter_context(patch.object(fake_device, "on_sync", device.sync))
        leave.enter_context(_values(config))
        leave.enter_context(_messages(device))
        leave.enter_context(patch.object(transfer, "ThreadPoolExecutor", _SameThread))
        leave.enter_context(patch.object(offload, "MOVED_TYPES", (torch.Tensor, FakeTensor)))
        yield Scene(config, _learner(config), device)


@contextlib.contextmanager
def _ranks(world: int, rank: int) -> Iterator[None]:
    """A process group whose other ranks do not exist, of which every collective is over at once."""
    from megascale.runtime import distributed

    environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    environment |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    new_group = dist.new_group

    def fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **_: Any) -> Any:
        return new_group(ranks, backend="fake")

    with contextlib.ExitStack() as leave:
        leave.enter_context(patch.dict(os.environ, environment))
        for module in (dist, dist.distributed_c10d):
            leave.enter_context(patch.object(module, "new_group", fake_group))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        leave.callback(dist.destroy_process_group)
        leave.callback(distributed.stop)
        yield


def _learner(config: Any) -> Any:
    from megascale.model import build
    from megascale.optim.build import build_optimizer
    from megascale.runtime import distributed
    from megascale.training.step import Learner

    with patch.object(distributed, "_join"):
        ranks = distributed.start(config)
    assert ranks.device.type == "cuda"
    with patch.object(build, "initialise"):  # it computes weights, which do not exist
        model = build.build_model(config, ranks)
    return Learner(config, ranks, model, build_optimizer(config, model))


class _SameThread:
    """In the place of a pool of threads, which would make real tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: Any) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        """The result at once."""
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


class _Work:
    """A message that is over."""

    def wait(self, *args: Any) -> None:
        """Returns at once, and the host does not wait for a device either."""


@contextlib.contextmanager
def _messages(device: Device) -> Iterator[None]:
    """Messages for which torch has no fake operator."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    def collective(name: str) -> Any:
        def send(*args: Any, **kwargs: Any) -> _Work:
            device.send(name)
            return _Work()

        return send

    def exchange(messages: Sequence[Any]) -> list[_Work]:
        for message in messages:
            device.send(message.op.__name__)
        return [_Work() for _ in messages]

    @contextlib.contextmanager
    def together(*args: Any, **kwargs: Any) -> Iterator[_Work]:
        yield _Work()

    with (
        patch.object(buffers, "_coalescing_manager", together),
        patch.object(buffers, "dist_all_gather_func", collective("all_gather")),
        patch.object(buffers, "dist_reduce_scatter_func", collective("reduce_scatter")),
        patch.object(dist, "batch_isend_irecv", exchange),
    ):
        yield


@contextlib.contextmanager
def _values(config: Any) -> Iterator[None]:
    """Lists of numbers of tensors: experts get equally many tokens, and keep their order."""
    from megatron.core.transformer.moe import token_dispatcher

    from megascale.model.dispatch import Dispatcher

    plain, plain_sort = torch.Tensor.tolist, token_dispatcher.sort_chunks_by_idxs
    moe, capacity = config.model.moe, config.planner.capacity_tokens

    def tolist(self: torch.Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return plain(self)
        if self.is_cuda:
            fake_device.on_sync("tolist")
        if moe is not None and self.numel() == moe.num_experts:
            return [capacity * moe.top_k // moe.num_experts] * moe.num_experts
        if self.numel() == 3:  # a pipeline asks for the shape of what comes
            shared = config.parallel.tensor if config.parallel.sequence_parallel else 1
            return [capacity // shared, 1, config.model.hidden_size]
        return [1] * self.numel()

    def sort(chunks: Any, sizes: Any, order: Any, **options: Any) -> Any:
        return plain_sort(chunks, sizes, np.arange(len(order)), **options)

    def on_host(self: Any, counts: torch.Tensor, sizes: torch.Tensor) -> list[list[int]]:
        fake_device.on_sync("tolist")
        tensor, expert = sizes.shape
        rows = capacity * moe.top_k // tensor
        return [[rows // expert] * expert, [rows // expert] * expert, [rows] * tensor]

    with (
        patch.object(Dispatcher, "_on_host", on_host),
        patch.object(torch.Tensor, "tolist", tolist),
        patch.object(FakeTensor, "tolist", tolist),
        patch.object(token_dispatcher, "sort_chunks_by_idxs", sort),
    ):
        yield
