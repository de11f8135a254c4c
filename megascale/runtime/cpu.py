"""megatron-core on a machine without CUDA: answers for what it takes for granted.

megatron-core asks `torch.cuda` for devices, streams and random states, makes tensors with a
literal `device="cuda"`, and compares `Tensor.type()` with `torch.cuda.FloatTensor`. On CPU ranks
each of these has one true answer, given here. `install` is called once, before megatron-core is
imported, and only where no CUDA device exists; nothing else in the code knows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed
from torch.distributed import ProcessGroupGloo, distributed_c10d
from torch.utils._device import _device_constructors

from megascale.runtime.megatron import fill_gaps

CPU = torch.device("cpu")
FACTORIES = (
    "arange empty empty_like full full_like ones ones_like rand rand_like randint randn "
    "randn_like tensor zeros zeros_like as_tensor"
).split()
_installed = False


class Stream:
    """A stream on a device that does one thing at a time: every wait is already over."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def synchronize(self) -> None:
        """Nothing is ever in flight."""

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def record(self, stream: Any = None) -> None:
        """An event that is recorded has happened."""

    def record_event(self, event: Any = None) -> Any:
        """The event, which has happened."""
        return event or Stream()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event(Stream):
    """An event on such a device: it has happened."""


def install() -> None:
    """Install every substitution; calling it again does nothing.

    Raises RuntimeError on a machine with CUDA, where all of it would be wrong.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("runtime.cpu answers for machines without CUDA; this one has it")
    _answer_for_devices()
    _answer_for_random_states()
    _redirect_factories()
    _answer_for_tensors()
    _answer_for_collectives()
    distributed_c10d.ProcessGroupGloo = _GlooGroup
    torch.compile = _identity_decorator
    _patch_megatron()
    _installed = True


@functools.cache
def _gloo_device() -> Any:
    return ProcessGroupGloo.create_default_device()


class _GlooGroup(ProcessGroupGloo):  # type: ignore[misc]
    """A group over the one device of this process.

    torch gives every group a device, whose thread wakes a hundred times a second, and
    megatron-core makes dozens of groups.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = self._Options()
        options._devices, options._timeout = [_gloo_device()], timeout
        super().__init__(store, rank, size, options)


def _answer_for_devices() -> None:
    """Each name gets a function of its own: dynamo refuses one object under two names."""
    torch.cuda.current_device = _returning(CPU)
    torch.cuda.Stream = Stream
    torch.cuda.Event = Event
    torch.cuda.current_stream = _returning(Stream())
    torch.cuda.default_stream = _returning(Stream())
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, _returning(None))
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _returning(None))


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _answer_for_random_states() -> None:
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _redirect_factories() -> None:
    _device_constructors()  # torch remembers them for `with torch.device(...)`, before ours come
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _answer_for_tensors() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None


def _answer_for_collectives() -> None:
    """Sizes: gloo wants lists, megatron-core's dispatcher passes tensors; and equal ones."""
    all_to_all_single = torch.distributed.all_to_all_single

    @functools.wraps(all_to_all_single)
    def with_lists(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all_single(
            output,
            input,
            _as_list(output_split_sizes),
            _as_list(input_split_sizes),
            group=group,
            async_op=async_op,
        )

    torch.distributed.all_to_all_single = with_lists
    torch.distributed.all_gather = _uneven_all_gather(torch.distributed.all_gather)
    torch.distributed.reduce_scatter = _uneven_reduce_scatter(torch.distributed.reduce_scatter)


class _Works:
    """The handle of a collective that is made of several, as torch's `Work`."""

    def __init__(self, works: list[Any], deliver: Callable[[], None]) -> None:
        """`deliver` copies the results to the caller's tensors when all `works` are done."""
        self._works, self._deliver = works, deliver
        self._is_delivered = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the results; `timeout` is for each work, and 0 is that of the group."""
        for work in self._works:
            work.wait(timeout)
        if not self._is_delivered:
            self._is_delivered = True
            self._deliver()
        return True

    def is_completed(self) -> bool:
        """Whether the results are there, so that `wait` would return at once."""
        return self._is_delivered or all(work.is_completed() for work in self._works)

    def result_of(self, async_op: bool) -> _Works | None:
        """What a collective returns: this handle, or None after the results are there."""
        if async_op:
            return self
        self.wait()
        return None


def _place_for_uneven(tensors: list[torch.Tensor], group: Any) -> int | None:
    """This rank's place in `group` where `tensors`, one of each rank, have unequal shapes.

    None where torch's own collective answers: for equal shapes, and outside of the group.
    """
    place = torch.distributed.get_rank(group)
    if place < 0 or len({tensor.shape for tensor in tensors}) <= 1:
        return None
    size = torch.distributed.get_world_size(group)
    if len(tensors) != size:
        raise ValueError(f"{len(tensors)} tensors for a group of {size} ranks; give one for each")
    return int(place)


def _uneven_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """gloo gathers equal sizes only; the expert ranks of a tensor group hold unequal ones."""

    @functools.wraps(all_gather)
    def gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        mine = _place_for_uneven(tensor_list, group)
        if mine is None:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        wholes = [output.contiguous() for output in tensor_list]
        wholes[mine].copy_(tensor)
        works = [
            torch.distributed.broadcast(whole, group=group, group_src=source, async_op=True)
            for source, whole in enumerate(wholes)
        ]

        def deliver() -> None:
            for output, whole in zip(tensor_list, wholes, strict=True):
                output.copy_(whole)

        return _Works(works, deliver).result_of(async_op)

    return gather


def _uneven_reduce_scatter(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of the above: each rank's part is reduced over the group."""

    @functools.wraps(reduce_scatter)
    def scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        mine = _place_for_uneven(input_list, group)
        if mine is None:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat([part.flatten() for part in input_list])
        work = torch.distributed.all_reduce(whole, op=op, group=group, async_op=True)
        parts = whole.split([part.numel() for part in input_list])

        def deliver() -> None:
            output.copy_(parts[mine].view_as(output))

        return _Works([work], deliver).result_of(async_op)

    return scatter


def _as_list(sizes: Any) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]


def _identity_decorator(function: Any = None, **options: Any) -> Any:
    """torch.compile, without compiling: a CPU rank has no use for a C++ build at start-up."""
    del options
    return function if function is not None else _identity_decorator


def _do_without_triton() -> None:
    """megatron-core 0.19 imports triton for these kernels whether or not they will be launched.

    They copy MoE activations on a GPU. A torch built for CPU alone does not bring triton.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    name = "megatron.core.transformer.moe.ops.paged_stash"
    kernels: Any = ModuleType(name)
    kernels.GLOBAL_BLOCK_SIZE = 1024
    kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = None
    sys.modules[name] = kernels


def _patch_megatron() -> None:
    _do_without_triton()
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    fill_gaps()
