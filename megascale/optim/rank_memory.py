"""Memory of a rank in training, counted without building anything."""

from __future__ import annotations

from dataclasses import dataclass

from megascale.config import Layout, RunConfig
from megascale.model.activations import activation_bytes, ring_peak_bytes
from megascale.model.counts import count_rank_parameters
from megascale.optim.optimizer_kind import find_optimizer


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the rank that needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    rings: int
    """What buffers of sequences that ranks share add to the peak of activations."""

    @property
    def total(self) -> int:
        """All of them; a process needs more, see `devices.memory.StageMemory`."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.rings


def memory_per_rank(config: RunConfig, layout: Layout) -> MemoryEstimate:
    """Memory of the fullest pipeline stage while it holds micro-batches of full capacity.

    Exact: weights of 2 bytes in bf16 or 4 in fp32; gradients of 4 bytes; what the optimizer keeps
    (`OptimizerKind.state_bytes`), a master copy in bf16 included.
    Estimates: activations and buffers of rings, see `model.activations`.
    """
    stages = [stage_memory(config, layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda estimate: estimate.total)


def stage_memory(config: RunConfig, layout: Layout, stage: int) -> MemoryEstimate:
    """The same, of one pipeline stage."""
    optimizer = find_optimizer(config.optim.name)
    held = count_rank_parameters(config.model, layout, stage)
    is_bf16 = config.train.precision == "bf16"
    parameters = held.dense + held.expert
    return MemoryEstimate(
        weights=parameters * (2 if is_bf16 else 4),
        gradients=parameters * 4,
        optimizer=optimizer.state_bytes(config, layout, stage),
        activations=activation_bytes(config, layout, stage),
        rings=ring_peak_bytes(config, layout, stage),
    )
