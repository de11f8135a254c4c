"""Gathers of weights beside computation: begun after the optimizer's step, awaited before use.

megatron-core's distributed optimizer updates a part of the weights on each rank. Its own overlap
begins each gather during the forward pass. Ranks that share sequences then wait for one another for
ever, because their rings stand at different places. Here all gathers begin in one place, in the
order in which a forward pass needs them. Each layer waits for all of its weights, also where a
module uses the weights of another (grouped experts, the loss).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class Gathers:
    """Gathers of weights that overlap with computation."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        """Of the weights of `chunks`; without any, all weights are gathered between steps."""
        self._groups = [
            group
            for chunk in chunks
            # megatron-core has them in the order of the backward pass
            for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups)
            for group in reversed(groups)
        ]

    def begin(self) -> None:
        """Begin those that have not begun since the last step; all ranks call it."""
        for group in self._groups:
            if not group.param_gather_dispatched:
                _wait([group])
                group.start_param_sync()

    def finish(self) -> None:
        """Bring all weights to their values after the last step; all ranks call it."""
        self.begin()
        self.wait()

    def wait(self) -> None:
        """Wait for those that have begun, before something else writes weights."""
        _wait(self._groups)

    def wait_before(
        self, module: torch.nn.Module, weights: Iterable[torch.nn.Parameter], chunk: Any
    ) -> None:
        """Let each forward pass of `module` wait for `weights` of `chunk`."""
        if not self._groups:
            return
        of_weight = chunk.param_to_bucket_group
        groups = {id(group): group for one in weights if (group := of_weight.get(one)) is not None}
        if groups:
            module.register_forward_pre_hook(partial(_before_forward, list(groups.values())))


def _before_forward(groups: list[Any], module: torch.nn.Module, inputs: Any) -> None:
    del module, inputs
    _wait(groups)


def _wait(groups: Sequence[Any]) -> None:
    for group in groups:
        if group.param_gather_handle is not None:
            group.param_gather_handle.wait()
            group.param_gather_handle = None
