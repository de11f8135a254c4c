"""From a ring of the plan to the tensors of one micro-batch.

Shape suffix: T tokens of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megascale.mesh.ring_calls import (
    arrays_of,
    host_calls,
    key_of,
    prefix_rows_of,
    with_tensors,
)
from megascale.mesh.ring_share import RingShare
from megascale.mesh.transfer import send_arrays


@dataclass
class Segments:
    """Where the sequences of a pack lie.

    It travels through megatron-core as its `packed_seq_params`, of which megatron-core itself
    reads only the format; our attention reads the rest.
    """

    positions_T: torch.Tensor
    """Position of each token in its own sequence, int64."""
    cu_seqlens: torch.Tensor
    """Cumulative lengths from 0 to T, int32."""
    lengths: tuple[int, ...]
    """Tokens of each sequence on this rank, in pack order; they sum to T."""
    ring: RingShare | None = None
    """The ring that shares the sequences; None when this rank holds them whole. Its tokens come
    first in the pack, and the rest is padding."""
    num_tokens: int = 0
    """Tokens that count; they come first in the pack, and the rest is padding."""
    sources: tuple[int, ...] = ()
    """The source of each sequence, padding aside; a number in the order of the sources."""
    rotary: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)
    """Cosines and sines at the positions by kind of angles, each filled by the first layer that
    needs it."""
    _owners: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    qkv_format: str = "thd"
    """megatron-core's word for [tokens, heads, head_dim]."""

    def owners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token that counts: its sequence, by place in the pack, and its source."""
        if self._owners is None:
            owner_T, source_T = send_arrays(
                _owners_of(self.lengths, self.sources), self.cu_seqlens.device
            )
            self._owners = owner_T, source_T
        return self._owners

    def end_group(self) -> None:
        """After a forward pass without a backward pass: let go of keys and values that no later
        chunk needs."""
        if self.ring is not None and self.ring.cache is not None and self.ring.is_last:
            self.ring.cache.clear()

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments of whole sequences, each starting at position 0."""
        return Segments._at(_positions(lengths), lengths, device)

    @staticmethod
    def of_share(ring: RingShare, padding: int, device: torch.device) -> Segments:
        """Segments of this rank's part in a ring, then `padding` tokens."""
        positions = np.concatenate([ring.positions(), np.arange(padding)])
        lengths = [*ring.lengths(), padding] if padding else ring.lengths()
        return replace(Segments._at(positions, lengths, device), ring=ring)

    @staticmethod
    def _at(positions: np.ndarray, lengths: Sequence[int], device: torch.device) -> Segments:
        positions_T, cu_seqlens = send_arrays([positions, _bounds(lengths)], device)
        return Segments(positions_T, cu_seqlens, tuple(int(n) for n in lengths))


def _positions(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])


def _bounds(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _owners_of(lengths: Sequence[int], sources: Sequence[int]) -> list[np.ndarray]:
    """Of each token that counts: its sequence and its source, both int64."""
    number = len(sources)
    owner_T = np.repeat(np.arange(number), np.asarray(lengths[:number], dtype=np.int64))
    return [owner_T, np.asarray(sources, dtype=np.int64)[owner_T]]


@dataclass(frozen=True)
class TokenSequence:
    """One sequence, or a rank's part of it: inputs, and the target after each input."""

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs at once."""

    tokens_T: torch.Tensor
    """Input ids, int64."""
    targets_T: torch.Tensor
    """The id that follows each input in its sequence, int64."""
    loss_mask_T: torch.Tensor
    """1.0 where the target counts, 0.0 for padding; fp32."""
    segments: Segments
    num_tokens: int
    """Targets that count."""
    offload: float = 0.0
    """Part of the activations of all layers but two to keep in host memory, 0 to 1."""


def pack(
    sequences: Sequence[TokenSequence],
    pad_id: int,
    multiple: int,
    device: torch.device,
    ring: RingShare | None = None,
    sources: Sequence[int] = (),
    windows: Sequence[int | None] = (None,),
) -> MicroBatch:
    """Join sequences into one micro-batch, padded to a `multiple` of tokens.

    With `ring`, `sequences` are this rank's parts of the ring's. `sources` number the source of
    each sequence; all 0 where they are not given. Padding is a sequence of its
    own whose targets do not count, so it changes no gradient; without tokens the whole
    micro-batch is padding. All tensors go to a CUDA device in one copy, for which the host does
    not wait. The copy has the tensors of the ring's calls too, for attention with each of
    `windows`.
    """
    lengths = [len(sequence.targets) for sequence in sequences]
    num_tokens = sum(lengths)
    sources = tuple(sources) or (0,) * len(lengths)
    padding = -num_tokens % multiple if num_tokens else multiple
    positions = ring.positions() if ring else _positions([*lengths, 0])
    if padding:
        filler = np.full(padding, pad_id, dtype=np.int64)
        sequences = [*sequences, TokenSequence(filler, filler)]
        lengths.append(padding)
        positions = np.concatenate([positions, np.arange(padding)])
    mask = np.zeros(num_tokens + padding, dtype=np.float32)
    mask[:num_tokens] = 1.0
    planned = windows if ring and device.type == "cuda" else ()
    hops = {window: host_calls(ring, window) for window in planned}
    arrays = [
        *(_join([part.inputs for part in sequences]), _join([part.targets for part in sequences])),
        *(mask, positions, _bounds(lengths), *_owners_of(lengths, sources)),
        *(array for calls in hops.values() for array in arrays_of(calls)),
    ]
    tokens_T, targets_T, mask_T, positions_T, cu_seqlens, owner_T, source_T, *rest = send_arrays(
        arrays, device
    )
    arrived = iter(rest)
    for window, calls in hops.items():
        ring.calls[key_of(window, True, device)] = with_tensors(calls, arrived)
        prefix_rows_of(ring, window, device)  # another copy, where a chunk sees a part of others
    segments = Segments(
        positions_T=positions_T,
        cu_seqlens=cu_seqlens,
        lengths=tuple(int(n) for n in lengths),
        ring=ring,
        num_tokens=num_tokens,
        sources=sources,
        _owners=(owner_T, source_T),
    )
    return MicroBatch(tokens_T, targets_T, mask_T, segments, num_tokens)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64, copy=False)
