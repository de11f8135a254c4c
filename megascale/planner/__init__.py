"""Which rank computes which sequences: lengths, cost and capacity in, a plan out. NumPy only."""

from megascale.planner.cost import CostModel
from megascale.planner.longest_first import plan_longest_first
from megascale.planner.plan import PlanError, Ring, StepPlan
from megascale.planner.timeline import Timeline, timeline

__all__ = [
    "CostModel",
    "PlanError",
    "Ring",
    "StepPlan",
    "Timeline",
    "plan_longest_first",
    "timeline",
]
