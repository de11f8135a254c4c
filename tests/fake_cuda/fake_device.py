"""A CUDA device that computes nothing: torch takes it for one, and its tensors are FakeTensors.

`install` patches torch for the whole process, which must have been started by
`tools/test_fake_cuda.sh`: two small libraries stand in for the driver. Shapes, types, devices and
signatures are checked as on a device, and nothing is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

LIBRARY = "MEGASCALE_FAKE_CUDA"
"""Variable with the path of the library that was loaded before torch."""
DEVICE = torch.device("cuda", 0)
NUM_DEVICES = 8

on_sync: Callable[[str], None] = lambda what: None  # noqa: E731
"""Called where the host would wait for the device outside of torch's operators."""


class Stream:
    """A stream or an event of the device: nothing is ever in flight."""

    device = DEVICE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Stream()

    def synchronize(self) -> None:
        """The host waits."""
        on_sync("synchronize")

    def query(self) -> bool:
        """All is done."""
        return True

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds."""
        return 1.0


def _answer(**values: Any) -> None:
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)


def install() -> None:
    """Make torch believe in NUM_DEVICES CUDA devices of compute capability 9.0."""
    torch._C._ensureCUDADeviceGuardSet()
    fake_tensor.init_gpu_context = lambda device: None
    state = torch.zeros(16, dtype=torch.uint8)
    _answer(
        is_available=True,
        is_initialized=True,
        device_count=NUM_DEVICES,
        _lazy_init=None,
        current_device=0,
        set_device=None,
        get_device_name="fake",
        get_device_capability=(9, 0),
        memory_allocated=0,
        is_current_stream_capturing=False,
        manual_seed=None,
        get_rng_state=state,
        set_rng_state=None,
        current_stream=Stream(),
        default_stream=Stream(),
        stream=contextlib.nullcontext(),
    )
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.synchronize = lambda device=None: on_sync("synchronize")
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.device_count = torch.cuda.device_count  # torch's own asks the driver
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: 0
    torch.cuda.default_generators = [_Generator(state)] * NUM_DEVICES
    torch.nn.Module._apply = _apply
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.pin_memory = _pin_memory
    torch.Tensor.is_pinned = lambda self, device=None: getattr(self, "in_pinned_memory", False)
    torch.tensor = _of_numbers(torch.tensor)
    _patch_types()
    torch.autograd.Variable._execution_engine = _Engine(torch.autograd.Variable._execution_engine)
    dist.all_gather_object = _all_gather_object
    dist.distributed_c10d.all_gather_object = _all_gather_object


class _Generator:
    def __init__(self, state: torch.Tensor) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._state if name.startswith("get") else None


def _apply(self: Any, function: Callable[..., Any], recurse: bool = True) -> Any:
    """As Module._apply. Fake tensors cannot be put into a Parameter that is there, so that it is
    made anew with its attributes."""
    for child in self.children():
        child._apply(function)
    for name, weight in self._parameters.items():
        if weight is None:
            continue
        with torch.no_grad():
            made = function(weight)
        if (made.device, made.dtype) != (weight.device, weight.dtype):
            new = torch.nn.Parameter(made.detach(), requires_grad=weight.requires_grad)
            own = vars(new)  # where a fake tensor is, among others
            own.update({key: value for key, value in vars(weight).items() if key not in own})
            self._parameters[name] = new
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    pinned = self.clone()
    pinned.in_pinned_memory = True  # type: ignore[attr-defined]
    return pinned


def _of_numbers(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor of lists in which tensors are: the host waits for each."""

    def numbers(data: Any) -> Any:
        if isinstance(data, list | tuple):
            return [numbers(inner) for inner in data]
        return data.item() if isinstance(data, torch.Tensor) and data.dim() == 0 else data

    def tensor(data: Any, **options: Any) -> torch.Tensor:
        return plain(numbers(data), **options)

    return tensor


def _patch_types() -> None:
    plain = torch.Tensor.type
    names = {
        torch.float32: "FloatTensor",
        torch.bfloat16: "BFloat16Tensor",
        torch.float16: "HalfTensor",
        torch.float64: "DoubleTensor",
    }

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain(self, *args, **kwargs)
        place = "torch.cuda." if self.is_cuda else "torch."
        return place + names.get(self.dtype, "LongTensor")

    torch.Tensor.type = type_


class _Engine:
    """torch's, which gives each device a thread, and asks once how many devices there are."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self._count = ctypes.c_int.in_dll(ctypes.CDLL(os.environ[LIBRARY]), "fake_device_count")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """As the engine's, with the devices that are made up."""
        self._count.value = NUM_DEVICES
        try:
            return self._plain.run_backward(*args, **kwargs)
        finally:
            self._count.value = 0


def _all_gather_object(into: list[Any], mine: Any, group: Any = None) -> None:
    into[:] = [mine] * len(into)


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors that are made inside hold nothing."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
