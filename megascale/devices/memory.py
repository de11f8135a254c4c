"""Whether a run fits a device: what is counted, and a named allowance for what is not."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from math import lcm

from megascale.config import Layout, RunConfig
from megascale.config.layout import least_capacity
from megascale.devices.table import DeviceMemory
from megascale.optim.rank_memory import MemoryEstimate, stage_memory

FRAGMENTATION = 0.05
"""Part of the activations that the allocator loses, because packs differ in length. An
assumption."""
TOKEN_MULTIPLE = 128
"""Of capacities that are proposed."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the fullest rank of a pipeline stage."""

    counted: MemoryEstimate
    context: int
    """The device's context, kernels and work spaces of libraries."""
    messages: int
    """Buffers of communicators; 0 with one rank."""
    fragmentation: int
    """What the allocator loses."""

    @property
    def allowance(self) -> int:
        """All that is assumed and not counted."""
        return self.context + self.messages + self.fragmentation

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.counted.total + self.allowance


def stage_memories(
    config: RunConfig, layout: Layout, device: DeviceMemory
) -> tuple[StageMemory, ...]:
    """The memory of each pipeline stage with micro-batches of full capacity."""
    counted = [stage_memory(config, layout, stage) for stage in range(layout.pipeline)]
    return tuple(
        StageMemory(
            counted=one,
            context=device.context_bytes,
            messages=device.message_bytes if layout.world > 1 else 0,
            fragmentation=round(FRAGMENTATION * (one.activations + one.rings)),
        )
        for one in counted
    )


def fullest(config: RunConfig, layout: Layout, device: DeviceMemory) -> int:
    """Bytes that the fullest stage needs."""
    return max(one.total for one in stage_memories(config, layout, device))


def most_tokens(config: RunConfig, layout: Layout, device: DeviceMemory) -> int:
    """The largest capacity with which every stage fits, a multiple of 128 tokens; 0: none.

    A larger capacity never needs less memory.
    """

    def is_too_large(units: int) -> bool:
        return fullest(with_capacity(config, units * TOKEN_MULTIPLE), layout, device) > (
            device.memory_bytes
        )

    # a token needs at least one byte
    units = range(1, device.memory_bytes // TOKEN_MULTIPLE)
    return bisect_left(units, True, key=is_too_large) * TOKEN_MULTIPLE


def auto_capacity(config: RunConfig, layout: Layout, device: DeviceMemory) -> int:
    """What `planner.capacity_tokens: auto` stands for: `most_tokens`, up to what is of use.

    A multiple of 128 tokens and of the tensor ranks, which share each micro-batch's tokens, or the
    most of use. 0 where the device holds less than the longest sequence needs of each rank.
    """
    multiple = lcm(TOKEN_MULTIPLE, layout.tensor)
    held = most_tokens(config, layout, device) // multiple * multiple
    tokens = min(held, _most_of_use(config, layout, multiple))
    return tokens if tokens >= least_capacity(config, layout.hdp) else 0


def _most_of_use(config: RunConfig, layout: Layout, multiple: int) -> int:
    """The context, or an even share of a batch where that is more: a rank has no use for more.

    The context where every micro-batch is padded to the capacity.
    """
    context = config.data.context_tokens
    if config.pads_to_capacity:
        return context
    share = -(-int(config.data.global_batch_tokens) // (layout.hdp * multiple)) * multiple
    return max(context, share)


def with_capacity(config: RunConfig, tokens: int) -> RunConfig:
    """The config with another `planner.capacity_tokens`."""
    return replace(config, planner=replace(config.planner, capacity_tokens=tokens))
