"""The second record of an optimizer: how it is built, what it keeps, in how many bytes.

The first one is in `config.optimizers` and names the module of this one. Modules of optimizers
import torch in their functions only, because the plan of a run asks for bytes without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megascale.config import Layout, RunConfig
from megascale.config.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from torch import Tensor

    from megascale.model.model import Model

ROWS, COLUMNS = -2, -1
"""Dimensions of a matrix."""


@dataclass(frozen=True)
class Factors:
    """Square tensors [matrices, size, size] that an optimizer keeps beside the moments of a weight,
    each for one dimension of its matrices as one tensor rank holds them."""

    dimensions: Mapping[str, int]
    """The dimension of each, ROWS or COLUMNS. A weight need not have all of them."""
    row_basis: str
    """The basis over the rows. The moments of a weight that has it are in it, so they and the
    factors of ROWS have the padded rows of the vocabulary. Nothing else in a checkpoint has."""
    with_rows: Callable[[Mapping[str, Tensor], int, int], dict[str, Tensor]]
    """The moments and the factors of ROWS of a vocabulary's matrix, by name, for another padding:
    of those tensors as they are stored, the ids and the new rows."""

    @property
    def of_rows(self) -> tuple[str, ...]:
        """Names of those that belong to the rows."""
        return tuple(name for name, dim in self.dimensions.items() if dim == ROWS)


@dataclass(frozen=True)
class StateTensors:
    """The tensors, by their names in the optimizer's state, that checkpoints keep of an optimizer.

    Master weights are no part of it: every optimizer has them in bf16.
    """

    moments: tuple[str, ...]
    """Those in the shape of their weight."""
    factors: Factors | None = None


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer."""

    build: Callable[[RunConfig, Any, Model], Any]
    """megatron-core's optimizer for the weights of the model. The second argument is its
    `OptimizerConfig`, in which rates are 0, since `set_rates` gives them in every step."""
    state_bytes: Callable[[RunConfig, Layout, int], int]
    """Bytes of the state and of master weights on the fullest rank of a pipeline stage."""
    state: StateTensors


def find_optimizer(name: str) -> OptimizerKind:
    """The optimizer that `optim.name` names."""
    kind: OptimizerKind = import_module(OPTIMIZERS[name].module).OPTIMIZER
    return kind
