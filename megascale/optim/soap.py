"""SOAP: what it keeps of each weight, and how it is built; `soap_algorithm` has its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from megascale.config import Layout, RunConfig
from megascale.model.matrices import Weight
from megascale.optim.dealing import dealt_bytes
from megascale.optim.optimizer_kind import COLUMNS, ROWS, Factors, OptimizerKind, StateTensors

if TYPE_CHECKING:
    from torch import Tensor

    from megascale.model.model import Model


def weight_bytes(max_dim: int, weight: Weight) -> int:
    """Bytes of SOAP's state of a weight, 4 per element.

    Two moments, and for each side of a matrix, up to `max_dim`, an average and a basis.
    """
    elements = 2 * math.prod(weight.shape)
    if len(weight.shape) == 2:
        sides = (weight.shape[0] // weight.fused, weight.shape[1])
        elements += weight.fused * sum(2 * side * side for side in sides if side <= max_dim)
    return 4 * elements


def _build(config: RunConfig, options: Any, model: Model) -> Any:
    from megascale.optim.soap_algorithm import Soap
    from megascale.optim.whole_weights import whole_weights

    optim = config.optim
    assert optim.beta1 is not None  # the config is finalized
    make = partial(
        Soap,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        refresh_steps=optim.soap_refresh_steps,
        max_dim=optim.soap_max_dim,
    )
    return whole_weights(config, options, model, make, partial(weight_bytes, optim.soap_max_dim))


def _state_bytes(config: RunConfig, layout: Layout, stage: int) -> int:
    return dealt_bytes(config, layout, stage, partial(weight_bytes, config.optim.soap_max_dim))


def _with_rows(state: Mapping[str, Tensor], kept: int, rows: int) -> dict[str, Tensor]:
    from megascale.optim.soap_algorithm import with_rows

    return with_rows(state, kept, rows)


OPTIMIZER = OptimizerKind(
    _build,
    _state_bytes,
    StateTensors(
        moments=("exp_avg", "exp_avg_sq"),
        factors=Factors(
            dimensions={
                "left_average": ROWS,
                "left_basis": ROWS,
                "right_average": COLUMNS,
                "right_basis": COLUMNS,
            },
            row_basis="left_basis",
            with_rows=_with_rows,
        ),
    ),
)
