"""What every planner is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.errors import UserError
from megascale.planner.cost import CostModel
from megascale.planner.plan import Mode, StepPlan, kept_share


@dataclass(frozen=True)
class OffloadModel:
    """What keeping activations in host memory saves and costs."""

    stage_layers: int
    """Transformer layers of a rank; the first and the last never offload."""
    bytes_per_token: float
    """Activation bytes of one token in one layer."""
    copy_bytes_per_s: float
    """The slower of device to host and host to device."""

    def gain(self, offload: float) -> float:
        """How many times its capacity a rank can hold when it offloads this part."""
        return 1.0 / kept_share(offload, self.stage_layers)


@dataclass(frozen=True)
class Problem:
    """One step to plan."""

    lengths: NDArray[np.int64]
    """Tokens of each sequence."""
    num_ranks: int
    """Ranks of the HDP axis."""
    capacity: int
    """Most tokens whose activations one rank keeps on its device in one micro-batch."""
    mode: Mode
    """How ranks may differ in what they run."""
    cost: CostModel
    """Seconds of a micro-batch on one pipeline stage, forward and backward."""
    pipeline: int = 1
    """Pipeline stages."""
    expert_group: int = 1
    """Consecutive ranks that run equal counts in lockstep mode; 1 in the other modes."""
    offload: OffloadModel | None = None
    """None: activations stay on the device."""
    budget_s: float | None = None
    """Seconds to spend on improving a plan; None: a fixed number of tries, so that equal problems
    have equal plans."""
    slowdown: tuple[float, ...] = ()
    """How many times as long as by `cost` each rank takes, at least 1; a ring is as slow as its
    slowest rank. Empty: all are alike. Only `hybrid` gives slow ranks less."""

    @staticmethod
    def of(
        lengths: ArrayLike,
        num_ranks: int,
        capacity: int,
        mode: Mode,
        cost: CostModel,
        **others: object,
    ) -> Problem:
        """Check and complete the description of a step.

        In lockstep mode `expert_group` is all ranks unless given. Raises ValueError for lengths
        that are no whole numbers of at least 1, an unknown mode, groups that do not divide the
        ranks, or slowdowns that are not one for each rank.
        """
        given = np.asarray(lengths)
        if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
            raise ValueError("lengths must be whole numbers of tokens, one for each sequence")
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r} must be one of {', '.join(get_args(Mode))}")
        tokens = given.astype(np.int64)
        if mode == "lockstep":
            others.setdefault("expert_group", num_ranks)
        else:
            others["expert_group"] = 1
        problem = Problem(tokens, num_ranks, capacity, mode, cost, **others)  # type: ignore[arg-type]
        shortest, group = int(tokens.min(initial=1)), problem.expert_group
        if shortest < 1:
            raise ValueError(f"a sequence has {shortest} tokens; every length must be at least 1")
        if num_ranks < 1 or capacity < 1 or group < 1 or num_ranks % group:
            raise ValueError(f"{num_ranks} ranks of {capacity} tokens in expert groups of {group}")
        slow = problem.slowdown
        if slow and (len(slow) != num_ranks or not all(1 <= one < math.inf for one in slow)):
            raise ValueError(f"slowdowns of {len(slow)} ranks, of {num_ranks} of at least 1 each")
        return problem

    def slowest(self, ranks: Iterable[int]) -> float:
        """How many times as long as by `cost` a ring of these ranks takes."""
        return max(self.slowdown[rank] for rank in ranks) if self.slowdown else 1.0

    @property
    def effective_ranks(self) -> float:
        """Ranks of full speed that do as much as all ranks together."""
        return sum(1 / slow for slow in self.slowdown) if self.slowdown else self.num_ranks

    def fast_first(self) -> Sequence[int]:
        """All ranks, those of a node together and the fast ones of it first."""
        ranks = range(self.num_ranks)
        if not self.slowdown:
            return ranks
        return sorted(ranks, key=lambda one: (one // self.cost.node_size, self.slowdown[one]))

    @property
    def stage_layers(self) -> int:
        """Layers of a rank as far as offload is concerned."""
        return self.offload.stage_layers if self.offload else 2

    def require_fit(self) -> None:
        """Raise UserError where the longest sequence is too long for all ranks together."""
        longest = int(self.lengths.max(initial=0))
        held = self.num_ranks * self.capacity
        most = int(held * (self.offload.gain(1.0) if self.offload else 1.0))
        if longest > most:
            per_rank = -(-longest * self.capacity // most)
            raise UserError(
                f"a sequence of {longest} tokens does not fit {self.num_ranks} ranks of "
                f"{self.capacity} tokens, offload included: cut sequences at {most} tokens "
                f"(data.context_tokens), let a rank hold {per_rank} (planner.capacity_tokens, or "
                "--capacity), or start more ranks"
            )


Planner = Callable[[Problem], StepPlan]
"""Pure, and deterministic but for `plan_s` (and for solvers stopped by a time limit).

Raises UserError where no plan exists (`Problem.require_fit`)."""
