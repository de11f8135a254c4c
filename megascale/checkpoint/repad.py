"""State in a basis over the rows of the vocabulary, from a checkpoint with another padding.

The basis is over all rows, the padded ones included, so such state is read whole and turned by the
rule of its optimizer (`Factors.with_rows`). Nothing else in a checkpoint depends on the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from megascale.checkpoint.boxes import MASTER, OPTIMIZER_PREFIX, Box
from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.storage import Index
from megascale.model.vocabulary import VOCABULARY
from megascale.optim.optimizer_kind import Factors, StateTensors

MASTER_PREFIX = f"{OPTIMIZER_PREFIX}{MASTER}."


def fits(key: str, stored: Shape, asked: Shape, state: StateTensors | None = None) -> bool:
    """Whether a tensor of a checkpoint is the one asked for, whatever the padding of either.

    Earlier versions saved padded rows of the vocabulary's weights, after those of its ids. What
    `repadded` finds fits by the rules of the optimizer's `state` alone.
    """
    if stored == asked or not key.endswith(VOCABULARY):
        return stored == asked
    if state is None or state.factors is None:
        return stored[1:] == asked[1:] and stored[0] > asked[0]
    name = key.removeprefix(OPTIMIZER_PREFIX).partition(".")[0]
    if name in state.factors.of_rows:
        return stored[:2] == asked[:2] == (1, 1)  # with tensor ranks the cut differs too
    return stored[1:] == asked[1:] and (name in state.moments or stored[0] > asked[0])


@dataclass(frozen=True)
class Repadded:
    """State of one weight that is to get other rows."""

    factors: Factors
    num_ids: int
    live: Mapping[str, Box]
    """By name, the memory of this rank."""
    read: Mapping[str, Box]
    """The same as the checkpoint has it, to be filled from there."""

    def write(self) -> None:
        """Turn what was read into the live memory."""
        stored = {name: box.live().reshape(box.shape[-2:]) for name, box in self.read.items()}
        rows = self.live[self.factors.row_basis].shape[-1]
        for name, tensor in self.factors.with_rows(stored, self.num_ids, rows).items():
            live = self.live[name].live()
            live.copy_(tensor.view(live.shape))


def repadded(index: Index, wanted: list[Box], state: StateTensors | None) -> list[Repadded]:
    """State among `wanted` that the checkpoint holds with another padding."""
    if state is None or state.factors is None:
        return []
    by_key = {box.key: box for box in wanted}
    names = (*state.moments, *state.factors.of_rows)
    prefixes = {name: f"{OPTIMIZER_PREFIX}{name}." for name in names}
    found = []
    for weight in VOCABULARY:
        live = {n: by_key[p + weight] for n, p in prefixes.items() if p + weight in by_key}
        basis = live.get(state.factors.row_basis)
        stored = index.tensors.get(basis.key) if basis is not None else None
        if basis is None or stored is None or tuple(stored.size) == basis.global_shape:
            continue
        read = {name: _as_stored(index, box) for name, box in live.items()}
        rows = next(by_key[p + weight] for p in ("", MASTER_PREFIX) if p + weight in by_key)
        found.append(Repadded(state.factors, rows.global_shape[0], live, read))
    return found


def _as_stored(index: Index, box: Box) -> Box:
    size = tuple(index.tensors[box.key].size)
    room = torch.empty(size, dtype=box.holder().dtype, device=box.holder().device)
    return Box(box.key, size, (0,) * len(size), size, partial(_itself, room), 0)


def _itself(room: torch.Tensor) -> torch.Tensor:
    return room
