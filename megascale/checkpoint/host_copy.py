"""Copies of a rank's state in host memory, made while the device goes on computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megascale.checkpoint.boxes import OPTIMIZER_PREFIX, Box
from megascale.optim.build import Optimizer


class HostCopy:
    """Host memory for boxes of a rank, and the stream that fills it.

    On CUDA the copy runs beside the passes of the next step, whose optimizer waits for it on the
    device. What others than the optimizer change (loads of routers, masks of layers) is small. It
    is copied before anything else runs.
    """

    def __init__(self, boxes: Sequence[Box], device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        lives = [box.live() for box in boxes]
        self._tensors = [
            torch.zeros(live.shape, dtype=live.dtype, device="cpu", pin_memory=on_cuda)
            for live in lives
        ]
        self._copied: Any = None
        """Event of the end of the copy begun last."""
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        pairs = list(zip(boxes, self._tensors, strict=True))
        self._stable = [pair for pair in pairs if _waits_for_optimizer(pair[0])]
        self._others = [pair for pair in pairs if not _waits_for_optimizer(pair[0])]

    def begin(self, optimizer: Optimizer) -> None:
        """Copy, or on CUDA begin to; the next update of `optimizer` waits for it.

        To be called again only when the tensors of the copy before are no longer read.
        """
        _copy(self._others)
        if self._stream is None:
            _copy(self._stable)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            _copy(self._stable)
        self._copied = self._stream.record_event()
        optimizer.readers.append(self._copied)

    def finished(self) -> list[torch.Tensor]:
        """The copy of each box, once the copy begun last is over; for any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors


def _waits_for_optimizer(box: Box) -> bool:
    """Whether the optimizer alone changes it: its state and the weights."""
    return box.key.startswith(OPTIMIZER_PREFIX) or box.holder().requires_grad


def _copy(pairs: Sequence[tuple[Box, torch.Tensor]]) -> None:
    for box, host in pairs:
        host.copy_(box.live(), non_blocking=True)
