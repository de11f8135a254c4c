"""Keys and values that the chunks of a group keep for later chunks, and their gradients.

A chunk computes a part of each of its sequences. Its queries attend to the keys of the chunks
before it too. The backward passes come in reverse order: when a chunk runs backward, the gradients
that later chunks have for its keys and values are all there.

Shape suffixes: S tokens of a chunk on this rank, P tokens of all chunks before it, K keys that a
chunk attends to, G key and value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from megascale.arrays import Integers
from megascale.mesh.kernels import Rows


class Chunk(NamedTuple):
    """What a chunk computes, as all ranks of its ring know it."""

    sequences: tuple[int, ...]
    """Its sequences, as indices into the lengths of the step."""
    bounds: Integers
    """The parts of its sequences on each rank, from `chunk_bounds`, as positions."""


class ChunkCache:
    """Keys and values of one group of chunks on this rank, apart for each attention."""

    def __init__(self, on_host: bool = False) -> None:
        """`on_host`: in host memory, from which every later chunk copies them back."""
        self._layers: dict[Hashable, _Layer] = {}
        self._on_host = on_host

    def extend(
        self, layer: Hashable, chunk: int, own_2SGD: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        """Keep the keys and values of a chunk; those that it attends to, (2, K, G, D).

        These are `rows` of the P tokens before it, and then its own. A pass that comes again, as
        with recomputation, keeps the same once more. Raises RuntimeError where the chunks before it
        have not run forward, or have run backward already.
        """
        kept = self._layers.setdefault(layer, _Layer()).kept_2SGD
        if len(kept) < chunk:
            raise RuntimeError(
                f"chunk {chunk} of a group runs forward, but its earlier chunks are not kept; run "
                "all chunks of a group forward, in order, and then all backward in reverse order"
            )
        kept[chunk:] = [_to_host(own_2SGD) if self._on_host else own_2SGD]
        return self.seen(layer, chunk, rows, own_2SGD.device)

    def seen(self, layer: Hashable, chunk: int, rows: Rows, device: torch.device) -> torch.Tensor:
        """What `extend` returned for this chunk, on `device`."""
        kept = self._layers[layer].kept_2SGD[: chunk + 1]
        *before, own = (part.to(device, non_blocking=True) for part in kept)
        if not before:
            return own
        prefix = torch.cat(before, dim=1)
        return torch.cat([prefix[:, rows], own], dim=1)

    def settle(
        self, layer: Hashable, chunk: int, gradient_2KGD: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        """Add the gradients of what a chunk attended to; its own, (2, S, G, D), which are complete.

        Chunks come in reverse order. The keys and values of this one are no longer kept.
        """
        kept = self._layers[layer]
        sizes = [part.shape[1] for part in kept.kept_2SGD[: chunk + 1]]
        begin, own = sum(sizes[:-1]), sizes[-1]
        total = kept.gradient_2PGD
        if total is None:
            total = gradient_2KGD.new_zeros((2, begin + own, *gradient_2KGD.shape[2:]))
        seen = gradient_2KGD.shape[1] - own
        total[:, begin:] += gradient_2KGD[:, seen:]
        before = total[:, :begin]
        before[:, rows] += gradient_2KGD[:, :seen]
        kept.gradient_2PGD = before if begin else None
        del kept.kept_2SGD[chunk:]
        return total[:, begin:]

    def clear(self) -> None:
        """Keep nothing any more."""
        self._layers.clear()


def _to_host(part: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; on CUDA in pinned memory, and made before later work of the stream."""
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    return copy.copy_(part, non_blocking=True)


class _Layer:
    """What one attention keeps."""

    def __init__(self) -> None:
        self.kept_2SGD: list[torch.Tensor] = []
        """Of each chunk so far; of those before it while a chunk runs backward."""
        self.gradient_2PGD: torch.Tensor | None = None
        """Of the keys and values of all chunks that are still to run backward; None: 0."""
