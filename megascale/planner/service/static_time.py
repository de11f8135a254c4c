"""What static context parallelism would take for a step that is planned ahead."""

from __future__ import annotations

from megascale.errors import UserError
from megascale.planner.peers.static import plan_static
from megascale.planner.problem import Planner, Problem

MOST_WORK = 1 << 18
"""Sequences of a step times its pipeline stages, above which static's plan is not made."""


def static_seconds(problem: Problem, planner: Planner) -> float | None:
    """Predicted seconds of the step under `plan_static`, beside a plan of `planner`.

    None where `planner` is `plan_static` itself, where static cannot hold the batch, and above
    MOST_WORK.
    """
    if planner is plan_static or len(problem.lengths) * problem.pipeline > MOST_WORK:
        return None
    try:
        return plan_static(problem).predicted_s
    except UserError:
        return None
