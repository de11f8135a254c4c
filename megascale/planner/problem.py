"""What every planner is given."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Integers
from megascale.errors import UserError
from megascale.planner.cost import CostModel
from megascale.planner.plan import Mode, StepPlan
from megascale.planner.ring import kept_share

MOST_RANKS, MOST_STAGES = 131_072, 1024
"""More than any cluster has, and as much as is planned in seconds."""
MOST_CHUNKS = 256
"""Of a wave; slots are far too small for a device long before."""
MOST_TOKENS = 1 << 40
"""Of a sequence, and of a rank; larger numbers are mistakes, and their squares overflow."""


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

    lengths: Integers
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

    chunks: int = 1
    """Most chunks that a plan may cut a wave into, where there are pipeline stages and ranks do not
    run freely. Only `hybrid` cuts waves."""

    @staticmethod
    def of(
        lengths: ArrayLike,
        num_ranks: int,
        capacity: int,
        mode: Mode,
        cost: CostModel,
        **others: Any,
    ) -> Problem:
        """Check and complete the description of a step.

        In lockstep mode `expert_group` is all ranks unless given. Whole numbers may be of any type,
        such as numpy's. Raises ValueError for anything that is not as the fields say.
        """
        tokens = _checked_lengths(lengths)
        num_ranks = _whole("num_ranks", num_ranks, MOST_RANKS)
        capacity = _whole("capacity_tokens", capacity, MOST_TOKENS)
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r} must be one of {', '.join(get_args(Mode))}")
        if not isinstance(cost, CostModel):
            raise ValueError(f"cost {cost!r:.60} is no CostModel")
        cost.require_sound()
        group = others.get("expert_group", num_ranks) if mode == "lockstep" else 1
        others["expert_group"] = _whole("expert_group", group, num_ranks)
        others["pipeline"] = _whole("pipeline", others.get("pipeline", 1), MOST_STAGES)
        others["chunks"] = _whole("chunks", others.get("chunks", 1), MOST_CHUNKS)
        others["slowdown"] = _checked_slowdown(others.get("slowdown", ()), num_ranks)
        _check_offload(others.get("offload"))
        problem = Problem(tokens, num_ranks, capacity, mode, cost, **others)
        if num_ranks % problem.expert_group:
            raise ValueError(
                f"expert_group = {problem.expert_group} must divide the {num_ranks} ranks"
            )
        return problem

    @property
    def may_chunk(self) -> bool:
        """Whether a plan may cut waves into chunks."""
        return self.chunks > 1 and self.pipeline > 1 and self.mode != "free"

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


def _whole(name: str, value: Any, most: int) -> int:
    """`value` as an int from 1 to `most`. Raises ValueError for anything else."""
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    number = operator.index(value) if is_whole else 0
    if not 1 <= number <= most:
        raise ValueError(f"{name} = {value!r:.40} must be a whole number from 1 to {most:,}")
    return number


def _checked_lengths(lengths: ArrayLike) -> Integers:
    """int64[N]. Raises ValueError for what is no list of whole numbers from 1 to MOST_TOKENS."""
    try:
        given = np.asarray(lengths)
    except (TypeError, ValueError, RuntimeError):  # a nested list, a tensor that has a gradient
        given = np.asarray("")
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError("lengths must be whole numbers of tokens, one for each sequence")
    for number in (given.min(initial=1), given.max(initial=1)):
        if not 1 <= number <= MOST_TOKENS:
            raise ValueError(
                f"a sequence has {number} tokens; every length must be from 1 to {MOST_TOKENS:,}"
            )
    return given.astype(np.int64)


def _checked_slowdown(slowdown: Any, num_ranks: int) -> tuple[float, ...]:
    """A number for each rank, or none. Raises ValueError for anything else."""
    try:
        numbers = tuple(map(float, slowdown))
    except (TypeError, ValueError):
        numbers = (0.0,)
    if numbers and not (len(numbers) == num_ranks and all(1 <= x < math.inf for x in numbers)):
        raise ValueError(
            f"slowdown {slowdown!r:.60} must have a number of at least 1 for each of the "
            f"{num_ranks} ranks, or be empty"
        )
    return numbers


def _check_offload(offload: Any) -> None:
    """Raise ValueError for what is no sound OffloadModel, and not None."""
    if offload is None:
        return
    if not isinstance(offload, OffloadModel):
        raise ValueError(f"offload {offload!r:.60} is no OffloadModel")
    _whole("offload.stage_layers", offload.stage_layers, MOST_TOKENS)
    for name in ("bytes_per_token", "copy_bytes_per_s"):
        value = getattr(offload, name)
        if not (isinstance(value, (int, float, np.number)) and 0 < value < math.inf):
            raise ValueError(f"offload.{name} = {value!r:.40} must be a number above 0")


Planner = Callable[[Problem], StepPlan]
"""Pure, and deterministic but for `plan_s` (and for solvers stopped by a time limit).

Raises UserError where no plan exists (`Problem.require_fit`)."""
