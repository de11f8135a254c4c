"""Many steps replayed on paper: what each planner makes of the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megascale.arrays import Floats
from megascale.errors import UserError, did_you_mean
from megascale.planner import PLANNERS, find_planner
from megascale.planner.chunk_rules import peak_tokens
from megascale.planner.peers.static import plan_static_rings
from megascale.planner.plan import StepPlan
from megascale.planner.problem import Planner, Problem
from megascale.planner.ring import PlanError, kept_share
from megascale.planner.timeline import ring_seconds, timeline

BASELINE = "static"
"""The planner that the others are compared with, see `plan_static_mesh`."""
SIZE_CLASSES = (1, 2, 9, 65, 513)
"""Smallest ring of each class of ring sizes."""


@dataclass(frozen=True)
class Outcome:
    """One step as one planner lays it out."""

    step_s: float
    lower_bound_s: float
    plan_s: float
    num_tokens: int
    idle_share: float
    """Part of all ranks' time in which they wait for others."""
    passing_share: float
    """Part of it in which they wait for keys and values that attention does not hide."""
    least_busy_s: float
    most_busy_s: float
    kept_tokens: int
    """Most tokens whose activations one rank keeps on its device."""
    offloaded_share: float
    """Part of all activations that goes to host memory."""
    num_rings: int
    """Micro-batches of all ranks, a ring counting once."""
    tokens_by_size: tuple[float, ...]
    """Part of the tokens in rings of each class of `SIZE_CLASSES`."""


def size_labels(num_ranks: int) -> list[str]:
    """Names of the classes of ring sizes, for rings of up to `num_ranks`."""
    ends = [begin - 1 for begin in SIZE_CLASSES[1:]] + [num_ranks]
    return [
        str(begin) if begin == end else f"{begin}-{min(end, num_ranks)}"
        for begin, end in zip(SIZE_CLASSES, ends, strict=True)
        if begin <= num_ranks
    ]


def judge(plan: StepPlan, problem: Problem, overhead_s: float = 0.0) -> Outcome:
    """What `plan` means for the step of `problem`, which ends with `overhead_s` on every rank.

    With pipeline stages busy time is that of one stage; what the others wait for is idle. Raises
    PlanError for a plan that breaks its own rules.
    """
    lengths = problem.lengths.tolist()
    plan.check(lengths)
    sizes = np.array([len(ring.ranks) for ring in plan.rings])
    tokens = np.array([ring.num_tokens(lengths) for ring in plan.rings])
    kept = np.array([kept_share(ring.offload, plan.stage_layers) for ring in plan.rings])
    busy_s = timeline(plan, problem.lengths, problem.cost).busy_s
    hidden = replace(problem.cost, pass_intra=0.0, pass_inter=0.0)
    exposed_s = ring_seconds(plan, problem.lengths, problem.cost) - ring_seconds(
        plan, problem.lengths, hidden
    )
    step_s = plan.predicted_s + overhead_s
    total = max(1, int(tokens.sum()))
    classes = np.searchsorted(SIZE_CLASSES, sizes, side="right") - 1
    by_size = np.bincount(classes, tokens, len(SIZE_CLASSES)) / total
    return Outcome(
        step_s=step_s,
        lower_bound_s=plan.lower_bound_s + overhead_s,
        plan_s=plan.plan_s,
        num_tokens=int(tokens.sum()),
        idle_share=1 - (float(busy_s.mean()) + overhead_s) / step_s,
        passing_share=float(np.dot(exposed_s, sizes)) / plan.num_ranks / step_s,
        least_busy_s=float(busy_s.min()),
        most_busy_s=float(busy_s.max()),
        kept_tokens=_kept_tokens(plan, problem, tokens * kept / sizes),
        offloaded_share=float(np.dot(tokens, 1 - kept)) / total,
        num_rings=len(plan.rings),
        tokens_by_size=tuple(by_size.tolist()),
    )


def _kept_tokens(plan: StepPlan, problem: Problem, of_rings: Floats) -> int:
    """Tokens that a rank keeps of a micro-batch; of chunks, all at a time over the stages."""
    most = of_rings.max(initial=0)
    if plan.pipeline > 1:
        peaks = peak_tokens(
            plan.rings, problem.lengths.tolist(), plan.num_ranks, plan.pipeline, plan.stage_layers
        )
        most = max(most, peaks.max() / plan.pipeline)
    return int(np.ceil(most - 1e-6))


def plan_static_mesh(problem: Problem, context: int) -> StepPlan:
    """The mesh that all planners are measured against: every sequence on rings of one size.

    The size is the smallest one that holds `context` tokens and divides the ranks. Apart from the
    size it is `plan_static`. It never offloads. Raises UserError where no such ring exists.
    """
    num_ranks = problem.num_ranks
    size = -(-context // problem.capacity)
    while size <= num_ranks and num_ranks % size:
        size += 1
    if size > num_ranks:
        raise UserError(
            f"a context of {context} tokens does not fit {num_ranks} HDP ranks of "
            f"{problem.capacity} tokens; give more ranks or a larger capacity"
        )
    return plan_static_rings(problem, size)


@dataclass(frozen=True)
class Replay:
    """Steps as one planner lays them out; empty where it has no plan for one of them."""

    name: str
    outcomes: tuple[Outcome, ...] = ()
    problem: str = ""
    """Why there is no plan."""

    def mean(self, field: str) -> float:
        """Mean of a field of `Outcome` over the steps."""
        return float(np.mean([getattr(outcome, field) for outcome in self.outcomes]))

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all steps over their time."""
        return self.mean("num_tokens") / self.mean("step_s")

    @property
    def tokens_by_size(self) -> Floats:
        """Mean part of the tokens in rings of each class of `SIZE_CLASSES`."""
        shares = np.array([outcome.tokens_by_size for outcome in self.outcomes])
        mean: Floats = shares.mean(axis=0)
        return mean

    def speedup_over(self, other: Replay) -> float:
        """How many times the tokens per second of `other`."""
        return self.tokens_per_s / other.tokens_per_s


@dataclass(frozen=True)
class Entrant:
    """A planner that takes part, by the name it gets in the result."""

    name: str
    planner: Planner
    adapt: Callable[[Problem], Problem] = lambda problem: problem
    """What is changed in each step's problem for it."""


def entrants_of(text: str | None, static: Planner, own: str = "hybrid") -> list[Entrant]:
    """The planners that `text` names, and `static` as the baseline.

    `text` has names with commas between; None: `own` and all planners that can share a sequence.
    `own` may be any name that `find_planner` takes. Raises UserError for an unknown name.
    """
    sharing = [name for name in PLANNERS if name != "longest_first"]
    names = [own, *sharing] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PLANNERS and name != own:
            meant = did_you_mean(name, PLANNERS)
            raise UserError(
                f"--planners {name}: unknown{meant}; planners are {', '.join(PLANNERS)}"
            )
    others = [name for name in dict.fromkeys(names) if name != BASELINE]
    return [Entrant(BASELINE, static), *(Entrant(name, find_planner(name)) for name in others)]


def replay(
    problems: Sequence[Problem],
    entrants: Iterable[Entrant],
    overhead_s: float = 0.0,
    on_step: Callable[[str, int], object] = lambda name, step: None,
) -> dict[str, Replay]:
    """Lay out each of `problems` with each entrant, on this one process.

    `on_step` hears about each step before it is planned. An entrant that finds no plan for a
    step, or one that breaks its own rules, leaves the field there; the others go on.
    """
    replays = {}
    for entrant in entrants:
        outcomes: list[Outcome] = []
        reason = ""
        for step, problem in enumerate(problems):
            on_step(entrant.name, step)
            adapted = entrant.adapt(problem)
            try:
                outcomes.append(judge(entrant.planner(adapted), adapted, overhead_s))
            except (UserError, PlanError) as error:
                broken = "an invalid plan: " if isinstance(error, PlanError) else ""
                outcomes, reason = [], f"{broken}{error}"
                break
        replays[entrant.name] = Replay(entrant.name, tuple(outcomes), reason)
    return replays


def replay_json(
    replays: Mapping[str, Replay], baseline: str, peak_bytes: Callable[[int], int]
) -> list[dict[str, object]]:
    """One plain object for each planner, means over the steps; null where it had no plan.

    `peak_bytes` gives a rank's memory from the tokens whose activations it keeps.
    """
    return [_row(one, replays.get(baseline), peak_bytes) for one in replays.values()]


def _row(
    one: Replay, baseline: Replay | None, peak_bytes: Callable[[int], int]
) -> dict[str, object]:
    if not one.outcomes:
        return {"planner": one.name, "problem": one.problem}
    means = (
        "step_s lower_bound_s plan_s idle_share passing_share least_busy_s most_busy_s "
        "offloaded_share num_rings"
    )
    row: dict[str, object] = {"planner": one.name, "steps": len(one.outcomes)}
    row |= {name: one.mean(name) for name in means.split()}
    row["tokens_per_s"] = one.tokens_per_s
    has_baseline = baseline is not None and baseline.outcomes
    row["speedup"] = one.speedup_over(baseline) if baseline and has_baseline else None
    row["over_lower_bound"] = one.mean("step_s") / one.mean("lower_bound_s")
    row["peak_bytes"] = peak_bytes(max(outcome.kept_tokens for outcome in one.outcomes))
    row["tokens_by_ring_size"] = [round(share, 4) for share in one.tokens_by_size.tolist()]
    return row
