"""From host memory to a device without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
ALIGNED_BYTES = 16
"""Each array of a copy begins at a multiple of it."""
AHEAD = 2
"""Items that are made in advance."""


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. For CUDA it is copied from pinned memory, and the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send_arrays(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on `device`, by one copy where it is CUDA; on CPU they share memory."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    sizes = [-(-array.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES for array in arrays]
    ends = np.cumsum([0, *sizes]).tolist()
    packed = np.zeros(ends[-1], dtype=np.uint8)
    for array, start in zip(arrays, ends, strict=False):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
    moved = send(torch.from_numpy(packed), device)
    return [
        moved[start : start + array.nbytes].view(torch.from_numpy(array).dtype)
        for array, start in zip(arrays, ends, strict=False)
    ]


def ahead(items: Iterator[T], device: torch.device, number: int = AHEAD) -> Iterator[T]:
    """The same items, made by a thread: up to `number` of them in advance.

    The thread begins at once. On CUDA, `device` is its current device, and it queues copies on the
    default stream, so the model computes after them. An error in making an item is raised when the
    caller asks for that item.
    """
    begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    thread = ThreadPoolExecutor(1, "micro-batches", initializer=begin)
    begun = deque(thread.submit(_next, items) for _ in range(number))
    return _taken(items, thread, begun)


def _taken(
    items: Iterator[T], thread: ThreadPoolExecutor, begun: deque[Future[list[T]]]
) -> Iterator[T]:
    with thread:
        while made := begun.popleft().result():
            begun.append(thread.submit(_next, items))
            yield made[0]


def _next(items: Iterator[T]) -> list[T]:
    """The next item; nothing at the end."""
    return list(islice(items, 1))
