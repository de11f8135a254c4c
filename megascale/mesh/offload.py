"""Part of the activations waits in host memory between forward and backward.

ByteScale, section "selective activation offload": of all layers of a stage but the first and the
last, a part r of what autograd saves is copied to host memory as the layer runs, and is copied
back before the backward pass needs it, last in, first out. What is copied are whole storages, so
that the device really gets the memory back; a storage that is saved twice, or through several
views, is copied once. On CUDA two streams beside the compute stream do the copies; on CPU the same
code copies at once.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST_BYTES = 16 * 1024
"""Smaller storages stay: starting their copy takes longer than the copy."""
BLOCK_BYTES = 32 * 1024 * 1024
"""Host memory is taken in blocks of this size, a power of two: torch's allocator of pinned
memory rounds up to one."""
MOVED_TYPES: tuple[type, ...] = (torch.Tensor,)
"""Tensors that may leave. A subclass has more than a storage."""


@dataclass
class Traffic:
    """What offload did to the storages that autograd saved in the layers it concerns."""

    moved_bytes: int = 0
    """Copied to host memory."""
    saved_bytes: int = 0
    """All of them; parameters and what the layers share are not counted."""


class Offloader:
    """Moves saved tensors of one model's layers; made once per model."""

    def __init__(
        self,
        layers: Iterable[torch.nn.Module],
        device: torch.device,
        smallest_bytes: int = SMALLEST_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """`layers` are those of this rank's stage, in the order in which they run."""
        self.layers = list(layers)
        self.smallest_bytes = smallest_bytes
        self.copies = _Copies(device)
        self.blocks = HostBlocks(block_bytes, pinned=device.type == "cuda")
        self.traffic = Traffic()

    @contextmanager
    def micro_batch(self, ratio: float) -> Iterator[None]:
        """Run a forward pass inside: about `ratio` (0 to 1) of the bytes is moved.

        Does nothing at all where the ratio is 0, no gradient is wanted, or the stage has no layer
        between its first and its last.
        """
        if ratio == 0 or not torch.is_grad_enabled() or len(self.layers) < 3:
            yield
            return
        window = _Window(self, ratio)
        with ExitStack() as leave:
            leave.callback(window.close)
            for index, layer in enumerate(self.layers[1:], start=1):
                begin = partial(window.begin_layer, index)
                leave.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
            leave.callback(self.layers[-1].register_forward_hook(window.end).remove)
            yield

    def take_traffic(self) -> Traffic:
        """What happened since this was last asked."""
        taken, self.traffic = self.traffic, Traffic()
        return taken


class HostBlocks:
    """Host memory in blocks of one size, pinned on CUDA, kept and used again."""

    def __init__(self, block_bytes: int, pinned: bool) -> None:
        self._block_bytes = block_bytes
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self.num_blocks = 0
        """Blocks there are, free or not."""

    @property
    def num_free(self) -> int:
        """Blocks that no micro-batch uses."""
        return len(self._free)

    def take(self) -> torch.Tensor:
        """A block (bytes,), uint8."""
        if self._free:
            return self._free.pop()
        self.num_blocks += 1
        return torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def give_back(self, blocks: Sequence[torch.Tensor]) -> None:
        """Blocks that were read, if not by now then before later work of the current stream.

        Copies into them wait for that stream.
        """
        self._free.extend(blocks)


class _Copies:
    """Copies between device and host on two streams beside the current one; on CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        self._leaving: Any = torch.cuda.Stream(device) if on_cuda else None
        self._returning: Any = torch.cuda.Stream(device) if on_cuda else None

    def leave(self, host: Sequence[torch.Tensor], flat: torch.Tensor) -> Any:
        """Start copying `flat` to the pieces in `host`; the event of the end, None when done."""
        return self._start(self._leaving, zip(host, _cut(flat, host), strict=True), None)

    def come_back(self, host: Sequence[torch.Tensor], flat: torch.Tensor, left: Any) -> Any:
        """Start copying back once the event `left` has come; the event of the end."""
        return self._start(self._returning, zip(_cut(flat, host), host, strict=True), left)

    def _start(
        self, stream: Any, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any
    ) -> Any:
        """The side stream waits for the current one: on the way out for the values, on the way
        back because the memory given to the copy may have been freed by work still queued."""
        if stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, event: Any) -> None:
        """Later work of the current stream starts after `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _cut(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return flat.split([len(piece) for piece in like])


class _Tape:
    """What one micro-batch keeps in host memory, written in order and unwound backwards.

    It lives as long as something on it may be read. Then its blocks are free again, be it after
    the backward pass or because the graph was dropped.
    """

    def __init__(self, offloader: Offloader) -> None:
        self.copies = offloader.copies
        self._take = offloader.blocks.take
        self._blocks: list[torch.Tensor] = []
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._moved: list[list[weakref.ref[_Moved]]] = [[] for _ in offloader.layers]
        ended = weakref.finalize(self, offloader.blocks.give_back, self._blocks)
        ended.atexit = False

    def write(self, flat: torch.Tensor, layer: int) -> _Moved:
        """Start copying the bytes `flat` of a storage that `layer` saved."""
        pieces, left = [], len(flat)
        while left:
            if not len(self._rest):
                self._rest = self._take()
                self._blocks.append(self._rest)
            pieces.append(self._rest[:left])
            self._rest = self._rest[left:]
            left -= len(pieces[-1])
        moved = _Moved(self, layer, pieces, self.copies.leave(pieces, flat))
        self._moved[layer].append(weakref.ref(moved))
        return moved

    def fetch(self, layer: int) -> None:
        """Start copying back what is left of `layer`, the last saved first."""
        waiting, self._moved[layer] = self._moved[layer], []
        for reference in reversed(waiting):
            moved = reference()
            if moved is not None:
                moved.fetch()


class _Moved:
    """One storage in host memory, and on the device again when it was fetched."""

    def __init__(self, tape: _Tape, layer: int, pieces: list[torch.Tensor], left: Any) -> None:
        self.tape, self.layer = tape, layer
        self.left = left
        self._pieces = pieces
        self._flat: torch.Tensor | None = None
        self._back: Any = None

    def fetch(self) -> None:
        """Start copying it back."""
        copies, num_bytes = self.tape.copies, sum(map(len, self._pieces))
        self._flat = torch.empty(num_bytes, dtype=torch.uint8, device=copies.device)
        self._back = copies.come_back(self._pieces, self._flat, self.left)

    def flat(self) -> torch.Tensor:
        """Its bytes on the device; the layer before starts to come back too."""
        self.tape.fetch(self.layer)
        self.tape.fetch(self.layer - 1)
        assert self._flat is not None, "it is on its tape until it is fetched"
        self._settle()
        return self._flat

    def _settle(self) -> None:
        self.tape.copies.wait(self._back)
        self._back = None

    def __del__(self) -> None:
        """Neither its memory on the device nor that on the host is used again before its copy
        back is done, even where nobody waited for that."""
        self._settle()


@dataclass(frozen=True)
class _Ticket:
    """Stands for a saved tensor in the graph."""

    moved: _Moved
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def restore(self) -> torch.Tensor:
        flat = self.moved.flat()
        empty = torch.empty(0, dtype=self.dtype, device=flat.device)
        return empty.set_(flat.untyped_storage(), self.offset, self.size, self.stride)


def _unpack(packed: torch.Tensor | _Ticket) -> torch.Tensor:
    return packed.restore() if isinstance(packed, _Ticket) else packed


class _Window:
    """The forward pass of one micro-batch: which storages leave, and when they are gone."""

    def __init__(self, offloader: Offloader, ratio: float) -> None:
        self._offloader = offloader
        self._ratio = ratio
        self._tape = _Tape(offloader)
        self._traffic = Traffic()
        self._hooks = ExitStack()
        self._layer = 0
        self._outside: set[int] = set()
        self._known: dict[int, tuple[StorageWeakRef, _Moved | None]] = {}
        self._leaving: list[tuple[int, torch.Tensor, Any]] = []

    def begin_layer(
        self, index: int, layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Before the layer of this index runs.

        What a layer saves counts up to the beginning of the next, so that the inputs that full
        recomputation keeps are among it.
        """
        self._layer = index
        self._free_sources(before=index - 1)
        if index == len(self._offloader.layers) - 1:
            self._hooks.close()
            return
        if index == 1:
            self._hooks.enter_context(saved_tensors_hooks(self._pack, _unpack))
        weights = (*layer.parameters(), *layer.buffers())
        inputs = [value for name, value in kwargs.items() if name != "hidden_states"]
        self._outside.update(map(_storage_id, (*weights, *_tensors([*args[1:], *inputs]))))

    def end(self, layer: torch.nn.Module, args: Any, output: Any) -> None:
        """After the last layer: its backward pass is the time to fetch the layer before. What has
        left makes room for the output head."""
        self._free_sources(before=len(self._offloader.layers))
        tape, fetched = weakref.ref(self._tape), self._layer - 1

        def fetch(_: torch.Tensor) -> None:
            living = tape()
            if living is not None:
                living.fetch(fetched)

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(fetch)

    def close(self) -> None:
        """After the forward pass, however it ended. Saved variables keep this object alive, so it
        lets go of everything."""
        self._hooks.close()
        self._free_sources(before=len(self._offloader.layers))
        self._known.clear()
        del self._tape
        total = self._offloader.traffic
        total.moved_bytes += self._traffic.moved_bytes
        total.saved_bytes += self._traffic.saved_bytes

    def _free_sources(self, before: int) -> None:
        """Let go of what earlier layers moved. Later work waits for those copies, since it may
        get this memory. `Tensor.record_stream` would not make it wait, but then the memory is
        free only once the device has come this far, and the host, which is ahead, asks for more."""
        while self._leaving and self._leaving[0][0] < before:
            _, _, left = self._leaving[0]
            self._offloader.copies.wait(left)
            del self._leaving[0]

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Ticket:
        moved = self._moved(tensor)
        if moved is None:  # detached, because a saved output would hold its own graph node
            return tensor if tensor.is_leaf else tensor.detach()
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        return _Ticket(moved, tensor.dtype, *place)

    def _moved(self, tensor: torch.Tensor) -> _Moved | None:
        """The storage of `tensor` on the tape; None where it stays.

        A storage is known by its address, which the weak reference keeps from being given to
        another one while this forward pass lasts.
        """
        plain = type(tensor) in MOVED_TYPES and tensor.layout == torch.strided
        if not plain or tensor.device != self._offloader.copies.device:
            return None
        key = _storage_id(tensor)
        if key in self._outside:
            return None
        if key not in self._known:
            storage = tensor.untyped_storage()
            self._known[key] = StorageWeakRef(storage), self._decide(storage)
        return self._known[key][1]

    def _decide(self, storage: torch.UntypedStorage) -> _Moved | None:
        """Move it if that brings moved / saved bytes closer to the ratio; the error of moved bytes
        stays within half the largest storage, but for small ones."""
        num_bytes, traffic = storage.nbytes(), self._traffic
        traffic.saved_bytes += num_bytes
        wanted = self._ratio * traffic.saved_bytes - traffic.moved_bytes
        if num_bytes < self._offloader.smallest_bytes or num_bytes / 2 > wanted:
            return None
        traffic.moved_bytes += num_bytes
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        moved = self._tape.write(flat, self._layer)
        if moved.left is not None:
            self._leaving.append((self._layer, flat, moved.left))
        return moved


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))
