"""Which rank computes which sequences: lengths, cost and capacity in, a plan out. NumPy only."""

from megascale.planner.bound import lower_bound_s
from megascale.planner.cost import CostModel
from megascale.planner.longest_first import plan_longest_first
from megascale.planner.plan import PlanError, Ring, StepPlan
from megascale.planner.problem import OffloadModel, Placed, Planner, Problem, complete
from megascale.planner.timeline import Timeline, step_s, timeline

PLANNERS: dict[str, Planner] = {"longest_first": plan_longest_first}
"""By the name that `planner.name` in a config and `megascale plan --planner` give."""

__all__ = [
    "PLANNERS",
    "CostModel",
    "OffloadModel",
    "Placed",
    "PlanError",
    "Planner",
    "Problem",
    "Ring",
    "StepPlan",
    "Timeline",
    "complete",
    "lower_bound_s",
    "plan_longest_first",
    "step_s",
    "timeline",
]
