"""What runs on a device: kernel launches, bytes, memory, messages, and where the host waits."""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fake_device
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided set_ detach lift_fresh resize_ "
    "_unsafe_view record_stream is_pinned alias as_strided view _local_scalar_dense "
    "_reshape_alias _to_fake device".split()
)
"""Operators that launch no kernel, beside views."""
UNKNOWN_SHAPE = ("masked_select", "nonzero")
"""Operators whose results have a size that the host must wait for."""
GRAIN_BYTES = 512
"""Memory is given in multiples of it."""
OURS = ("/megascale/", "/megatron/")


@dataclass
class Counts:
    """What happened since they were begun."""

    launches: Counter[str] = field(default_factory=Counter)
    """Kernel launches by operator."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes that these read and write, by operator."""
    messages: Counter[str] = field(default_factory=Counter)
    """Collectives and point-to-point messages, by their operation."""
    syncs: Counter[str] = field(default_factory=Counter)
    """Where the host waits for the device: what, and the function that asks for it."""
    copies: Counter[str] = field(default_factory=Counter)
    """Copies to the device for which the host does not wait, by the function that starts them."""
    start_bytes: int = 0
    peak_bytes: int = 0
    """Most device memory of tensors at a time."""

    @property
    def num_launches(self) -> int:
        """Of all operators."""
        return self.launches.total()

    @property
    def num_bytes(self) -> int:
        """Of all operators."""
        return self.bytes.total()


class Device(TorchDispatchMode):
    """Sees every operator on tensors of the fake device."""

    def __init__(self, selected: Callable[[torch.Tensor], int] = len) -> None:
        """`selected` is how many elements a mask selects."""
        super().__init__()
        self.counts = Counts()
        self._selected = selected
        self._storages: dict[int, int] = {}
        """Bytes of each storage that exists."""
        self._used_bytes = 0
        """Sum of these."""

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts of what runs inside."""
        outer, self.counts = self.counts, Counts()
        self.counts.start_bytes = self.counts.peak_bytes = self._used_bytes
        try:
            yield self.counts
        finally:
            self.counts = outer

    def sync(self, what: str) -> None:
        """The host waits."""
        self.counts.syncs[f"{what} in {caller()}"] += 1

    def send(self, operation: str) -> None:
        """A message."""
        self.counts.messages[operation] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and give values where an operator asks for them."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = _tensors([args, kwargs])
        if name == "_local_scalar_dense":
            return self._item(given[0], func)
        for tensor in given:
            if isinstance(tensor, FakeTensor):
                tensor.constant = None  # else torch computes with its values
        if name in UNKNOWN_SHAPE and _is_on_device(given[0]):
            self.sync(name)
            if name == "masked_select":
                return given[0].new_empty(self._selected(given[0]))
        results = func(*args, **kwargs)
        if name == "set_":
            FakeTensorMode.cache_clear()  # a key of it would keep the storage
        made = _tensors(results)
        self._see_copy(name, args, kwargs, given, made)
        if func.namespace == "c10d":
            self.send(name)
        else:
            made = _tensors([results, _changed(func, args, kwargs)])
            self._count(name if not func.is_view else "view", given, made)
        return results

    def _item(self, tensor: torch.Tensor, func: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return func(tensor)
        if tensor.is_cuda:
            self.sync("item")
        elif tensor.constant is not None:
            return tensor.constant.item()
        return 1.0 if tensor.is_floating_point() else 1

    def _count(self, name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        for tensor in made:
            if _is_on_device(tensor):
                self._hold(tensor)
        if name in NO_KERNEL or not any(map(_is_on_device, (*given, *made))):
            return
        read = {id(one): one for one in given if not name.startswith("zero")}
        if name == "copy_":  # its target is written only
            read.pop(id(given[0]), None)
        moved = [one for one in (*read.values(), *made) if _is_on_device(one)]
        self.counts.launches[name] += 1
        self.counts.bytes[name] += sum(map(_dense_bytes, moved))

    def _see_copy(
        self, name: str, args: Any, kwargs: Any, given: list[Any], made: list[Any]
    ) -> None:
        if name not in ("_to_copy", "copy_"):
            return
        source = given[-1] if name == "copy_" else given[0]
        target = given[0] if name == "copy_" else made[0]
        if _is_on_device(source) == _is_on_device(target):
            return
        free = kwargs.get("non_blocking", False) or (len(args) > 2 and bool(args[2]))
        host = target if _is_on_device(source) else source
        pins_itself = name == "_to_copy" and _is_on_device(source)  # what a free copy returns
        if free and (pins_itself or host.is_pinned()):
            self.counts.copies[caller()] += not _is_on_device(source)
        else:
            self.sync("copy to host" if _is_on_device(source) else "copy to device")

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES
        self._storages[key] = size
        self._used_bytes += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._used_bytes)
        weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self._used_bytes -= self._storages.pop(key, 0)


def caller() -> str:
    """The function of this project, or of megatron-core, that is running: file:function."""
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in OURS) and "fake_cuda" not in frame.filename:
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.name}"
    return "nowhere"


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to and does not return, as fused optimizers do."""
    if func._schema.returns:
        return []
    arguments = func._schema.arguments
    given = {**dict(zip((one.name for one in arguments), args, strict=False)), **kwargs}
    return [
        given[one.name]
        for one in arguments
        if one.alias_info is not None and one.alias_info.is_write and one.name in given
    ]


def _is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == fake_device.DEVICE.type


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for inner in value for tensor in _tensors(inner)]
    return []


def _dense_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that exist; an expanded dimension has one."""
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride else 1
    return number * tensor.element_size()
