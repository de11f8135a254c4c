"""`planner.capacity_tokens: auto` on the ranks of a run: what the smallest device holds."""

from __future__ import annotations

import numpy as np
import torch

from megascale.config import RunConfig
from megascale.devices.memory import with_capacity
from megascale.devices.table import DeviceMemory
from megascale.errors import UserError
from megascale.run.auto_capacity import recorded_capacity, with_capacity_of
from megascale.runtime.distributed import Ranks, gather_arrays
from megascale.runtime.first_rank import from_first_rank
from megascale.runtime.logs import say


def with_own_capacity(config: RunConfig, ranks: Ranks, resumes: bool = False) -> RunConfig:
    """A finalized config with the number for `auto`, the same on every rank; all ranks call it.

    The smallest memory of all ranks counts. A run that `resumes` on the layout of its checkpoint
    keeps its number. Raises UserError on CPU ranks, and where no number works.
    """
    if not config.has_auto_capacity:
        return config
    name, mine = device_memory(ranks.device)
    memory = gather_arrays(np.array([mine]), ranks)

    def resolve() -> bytes:
        assert memory is not None, "this is rank 0"
        tokens = recorded_capacity(config, ranks.layout) if resumes else None
        how = "as when the run was started"
        if tokens is None:
            device = DeviceMemory(memory_bytes=int(memory.min()))
            found = with_capacity_of(config, ranks.layout, name, device)
            tokens, how = found.planner.capacity_tokens or 0, f"what {name} holds"
        say(f"planner.capacity_tokens: auto is {tokens:,}, {how}")
        return str(tokens).encode()

    return with_capacity(config, int(from_first_rank(ranks, resolve)))


def device_memory(device: torch.device) -> tuple[str, int]:
    """Name and bytes of memory of a GPU. Raises UserError for a CPU."""
    if device.type != "cuda":
        raise UserError(
            "planner.capacity_tokens = auto needs a GPU: CPU ranks share the memory of their "
            "machine, and activations are counted for the kernels of GPUs; give a number, or "
            "leave the option out, so that each rank holds data.context_tokens"
        )
    properties = torch.cuda.get_device_properties(device)
    return properties.name, int(properties.total_memory)
