"""Planners by name: our own, the peers, and any function of the user's."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec

from megascale.errors import UserError, did_you_mean, reason
from megascale.planner.hybrid.search import plan_hybrid
from megascale.planner.peers.bytescale import plan_bytescale, plan_bytescale_naive
from megascale.planner.peers.flexsp import plan_flexsp
from megascale.planner.peers.longest_first import plan_longest_first
from megascale.planner.peers.static import plan_static, plan_static_balanced, plan_static_best
from megascale.planner.plan import StepPlan
from megascale.planner.problem import Planner, Problem
from megascale.planner.ring import PlanError

PLANNERS: dict[str, Planner] = {
    "hybrid": plan_hybrid,
    "longest_first": plan_longest_first,
    "bytescale": plan_bytescale,
    "bytescale_naive": plan_bytescale_naive,
    "flexsp": plan_flexsp,
    "static": plan_static,
    "static_balanced": plan_static_balanced,
    "static_best": plan_static_best,
}
"""By the name that `planner.name` in a config and `megascale plan --planner` give."""


def find_planner(name: str) -> Planner:
    """The planner of this name, or the function that `module:function` names.

    Such a function takes a `Problem` and returns a `StepPlan`, and stands at the top of a module
    that can be imported, since a process of its own calls it. A module that is found nowhere else
    may lie in the working directory. Raises UserError where there is none.
    """
    if name in PLANNERS:
        return PLANNERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(
            f"planner {name}: unknown{did_you_mean(name, PLANNERS)}; planners are "
            f"{', '.join(PLANNERS)}, or a function of yours as module:function"
        )
    try:
        _look_in_working_directory(module)
        planner: Planner = getattr(import_module(module), function)
    except Exception as error:  # importing runs code of the user's
        raise UserError(f"planner {name}: {reason(error)}; give module:function") from None
    if not callable(planner):
        raise UserError(f"planner {name}: is no function")
    return planner


def _look_in_working_directory(module: str) -> None:
    """Let a module of there be imported, as `python -m` would, after all others."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path and find_spec(module.partition(".")[0]) is None:
        sys.path.append(here)


def plan_with(name: str, problem: Problem) -> StepPlan:
    """The plan that the planner `name` makes of a problem, checked.

    Raises UserError where there is no such planner, where it finds no plan, and where what it makes
    is no plan of this problem.
    """
    plan = find_planner(name)(problem)
    if not isinstance(plan, StepPlan):
        kind = type(plan).__name__
        raise UserError(f"planner {name} returned {kind}; a planner returns a megascale StepPlan")
    try:
        plan.check(problem.lengths.tolist())
    except PlanError as error:
        raise UserError(f"planner {name} made no plan of these sequences: {error}") from None
    return plan
