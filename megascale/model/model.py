"""This rank's part of the model, and what works beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from megascale.mesh.offload import Offloader
from megascale.model.balance import Balance
from megascale.model.gathers import Gathers
from megascale.model.layers import LayerMask
from megascale.model.timing import ComputeTimer


@dataclass(frozen=True)
class Model:
    """This rank's part of the model."""

    chunks: list[DistributedDataParallel]
    """Parts of the network in the order of its layers; one for each stage that this rank runs."""
    offloader: Offloader
    """Runs the micro-batches that keep activations in host memory."""
    balance: Balance | None
    """Counts what the routers choose; None without experts."""
    timer: ComputeTimer
    """Times forward passes."""
    masked_layers: list[LayerMask]
    """Layers that a step opens further."""
    gathers: Gathers
    """Brings the weights to all ranks after a step."""
    overlaps: bool
    """Whether gradients may be reduced during a backward pass."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The weights of all chunks, with their names inside their chunk."""
        for chunk in self.chunks:
            yield from chunk.named_parameters()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights of all chunks."""
        return (weight for _, weight in self.named_parameters())

    def modules(self) -> Iterator[torch.nn.Module]:
        """The modules of all chunks."""
        for chunk in self.chunks:
            yield from chunk.modules()

    def train(self, mode: bool = True) -> None:
        """Set all chunks to training, or with `mode` false to evaluation."""
        for chunk in self.chunks:
            chunk.train(mode)

    def eval(self) -> None:
        """Set all chunks to evaluation."""
        self.train(False)

    def zero_grad_buffer(self) -> None:
        """Set the gradients of all chunks to zero, before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def overlap_reductions(self, overlap: bool) -> None:
        """Whether the next step reduces gradients during its last backward passes; the same on all
        ranks. Without `parallel.overlap` and on CPU it never does."""
        for chunk in self.chunks:
            chunk.ddp_config.overlap_grad_reduce = overlap and self.overlaps

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of all chunks by `factor`."""
        for chunk in self.chunks:
            chunk.scale_gradients(factor)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes inside are not reduced over ranks."""
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(chunk.no_sync())
            yield
