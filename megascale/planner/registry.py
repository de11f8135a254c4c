"""Planners by name: our own, the peers, and any function of the user's."""

from __future__ import annotations

import difflib
from importlib import import_module

from megascale.errors import UserError, reason
from megascale.planner.hybrid.search import plan_hybrid
from megascale.planner.peers.bytescale import plan_bytescale, plan_bytescale_naive
from megascale.planner.peers.flexsp import plan_flexsp
from megascale.planner.peers.longest_first import plan_longest_first
from megascale.planner.peers.static import plan_static, plan_static_balanced, plan_static_best
from megascale.planner.problem import Planner

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
    that can be imported, since a process of its own calls it. Raises UserError where there is none.
    """
    if name in PLANNERS:
        return PLANNERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, PLANNERS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"planner {name}: unknown{meant} Planners are {', '.join(PLANNERS)}, or a function of "
            "yours as module:function"
        )
    try:
        planner: Planner = getattr(import_module(module), function)
    except Exception as error:  # importing runs code of the user's
        raise UserError(f"planner {name}: {reason(error)}; give module:function") from None
    if not callable(planner):
        raise UserError(f"planner {name}: is no function")
    return planner
