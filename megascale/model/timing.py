"""How fast this rank computes: the linear maps of some forward passes, timed.

In them a rank waits for no other (but for the ranks that share its tensors), while the time of a
step, or of a whole micro-batch, is mostly that of the slowest. CUDA events on GPUs, else a clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megascale.arrays import Floats

TIMED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
SAMPLED = 3
"""Micro-batches of a step that are timed."""


class ComputeTimer:
    """Times the linear maps of dense layers and attentions on one rank."""

    def __init__(self, layers: Sequence[Any], device: torch.device) -> None:
        """`layers` are transformer layers of megatron-core."""
        self._on_cuda = device.type == "cuda"
        self._left, self._active = 0, False
        self._samples: list[list[Any]] = []
        for layer in layers:
            for name, module in layer.named_modules():
                if name.rpartition(".")[2] in TIMED and ".experts" not in name:
                    module.register_forward_pre_hook(self._before)
                    module.register_forward_hook(self._after)

    def begin_step(self) -> None:
        """Time the first micro-batches of a step."""
        self._left = SAMPLED

    def micro_batch(self) -> None:
        """Begin a forward pass."""
        self._active = self._left > 0
        self._left -= self._active
        if self._active:
            self._samples.append([0, 0, 0.0, []])

    def take(self) -> Floats:
        """What was timed since it was last asked, [micro-batch, (calls, tokens, seconds)].

        Tokens are summed over calls. Waits for the device.
        """
        self._active, samples, self._samples = False, self._samples, []
        if self._on_cuda:
            torch.cuda.synchronize()
        rows = [
            (calls, tokens, seconds + sum(a.elapsed_time(b) for a, b in events) / 1e3)
            for calls, tokens, seconds, events in samples
            if calls
        ]
        return np.array(rows, dtype=np.float64).reshape(-1, 3)

    def _before(self, module: Any, given: Sequence[Any]) -> None:
        if self._active:
            self._began = self._now()

    def _after(self, module: Any, given: Sequence[Any], result: Any) -> None:
        if not self._active:
            return
        sample = self._samples[-1]
        sample[0] += 1
        sample[1] += given[0].shape[0] * given[0].shape[1]
        if self._on_cuda:
            sample[3].append((self._began, self._now()))
        else:
            sample[2] += time.perf_counter() - self._began

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
