"""Which rank computes which sequences: lengths, cost and capacity in, a plan out. NumPy only."""

from typing import TYPE_CHECKING

from megascale.exports import lazily
from megascale.planner.bound import lower_bound_s
from megascale.planner.cost import CostModel
from megascale.planner.fill_bound import fill_bound_s
from megascale.planner.hybrid.search import plan_hybrid
from megascale.planner.peers.bytescale import plan_bytescale, plan_bytescale_naive
from megascale.planner.peers.flexsp import plan_flexsp
from megascale.planner.peers.longest_first import plan_longest_first
from megascale.planner.peers.static import plan_static, plan_static_balanced, plan_static_best
from megascale.planner.plan import StepPlan
from megascale.planner.plan_builder import Placed, complete
from megascale.planner.problem import OffloadModel, Planner, Problem
from megascale.planner.registry import PLANNERS, find_planner, plan_with
from megascale.planner.ring import PlanError, Ring
from megascale.planner.shares import RankMicroBatch
from megascale.planner.timeline import Timeline, step_s, timeline

if TYPE_CHECKING:
    from megascale.planner.service.ahead import PlansAhead as PlansAhead

# lazily, because its process runs a module of that package as a script
__getattr__, __dir__ = lazily(__name__, {"PlansAhead": "megascale.planner.service.ahead"})

__all__ = [
    "PLANNERS",
    "CostModel",
    "OffloadModel",
    "Placed",
    "PlanError",
    "Planner",
    "PlansAhead",
    "Problem",
    "RankMicroBatch",
    "Ring",
    "StepPlan",
    "Timeline",
    "complete",
    "fill_bound_s",
    "find_planner",
    "lower_bound_s",
    "plan_bytescale",
    "plan_bytescale_naive",
    "plan_flexsp",
    "plan_hybrid",
    "plan_longest_first",
    "plan_static",
    "plan_static_balanced",
    "plan_static_best",
    "plan_with",
    "step_s",
    "timeline",
]
