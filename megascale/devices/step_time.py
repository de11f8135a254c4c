"""What a step costs on a device, and what the time of a planned step consists of."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np

from megascale.config import Layout, RunConfig
from megascale.devices.rates import (
    TokenSeconds,
    cost_of,
    cut_of,
    shape_of,
    sync_s,
    token_seconds,
)
from megascale.devices.table import Device
from megascale.errors import UserError
from megascale.model.counts import count_rank_parameters
from megascale.planner import CostModel, Problem, StepPlan, step_s, timeline
from megascale.planner.timeline import ring_seconds

NOTHING = CostModel(a=0.0, b=0.0)


@dataclass(frozen=True)
class StepCost:
    """Seconds of micro-batches and of the end of a step."""

    cost: CostModel
    """What the step is planned with."""
    per_token: TokenSeconds
    """What its seconds per token consist of."""
    reduction_s: float
    """Gradients summed and weights gathered, after the last micro-batch."""
    padding_s: float = 0.0
    """Of `cost.fixed`: tokens up to the capacity, where every micro-batch is padded."""


def step_cost(config: RunConfig, layout: Layout, device: Device) -> StepCost:
    """What steps of this run cost on this device.

    Micro-batches: measured where `planner.cost` names a file, else from the data sheet. The
    reduction of gradients is from the data sheet in both cases.
    """
    cut, shape = cut_of(config, layout), shape_of(config, layout.tensor)
    held = [count_rank_parameters(config.model, layout, one) for one in range(layout.pipeline)]
    parameters = max(one.dense + one.expert for one in held)
    reduction_s = sync_s(parameters, device, cut, layout.hdp)
    if config.planner.cost is not None:
        cost = measured_cost(config.planner.cost)
        return StepCost(cost, TokenSeconds(cost.b, 0.0, 0.0), reduction_s)
    cost, per_token = cost_of(shape, device, cut), token_seconds(shape, device, cut)
    padded_s = padding_s(config, cost)
    if padded_s:
        cost = replace(cost, b=0.0, fixed=cost.fixed + padded_s)
    return StepCost(cost, per_token, reduction_s, padded_s)


def padding_s(config: RunConfig, cost: CostModel) -> float:
    """Seconds that tokens take in a micro-batch that is padded to the full capacity; else 0."""
    return cost.b * (config.planner.capacity_tokens or 0) if config.pads_to_capacity else 0.0


@cache
def measured_cost(path: str) -> CostModel:
    """The costs of a file of `megascale calibrate`, read once: all steps are planned with them."""
    try:
        return CostModel.load(path)
    except UserError as error:
        raise UserError(f"planner.cost: {error}; megascale calibrate writes one") from None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, means over all ranks, of which each second counts in one field."""

    attention_s: float
    """Scores of queries and keys."""
    linear_s: float
    """Matrix products with weights, and everything else that grows with tokens."""
    exchange_s: float
    """Messages of tensor parallelism and of experts."""
    launch_s: float
    """Starts of micro-batches."""
    ring_s: float
    """Keys and values on their way round rings, as far as attention does not hide them."""
    reduction_s: float
    """Gradients summed and weights gathered."""
    fill_s: float
    """Pipeline stages waiting for each other."""
    imbalance_s: float
    """Ranks waiting for the busiest rank and for rings to meet."""

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return float(sum(getattr(self, one.name) for one in fields(self)))


def step_time(plan: StepPlan, problem: Problem, given: StepCost) -> StepTime:
    """Take the predicted time of `plan` apart.

    A rank is busy for the time of its rings on one pipeline stage. Until its stage would be done
    if no other stage existed it waits for other ranks (imbalance), then for other stages (fill).
    """
    cost, lengths = given.cost, problem.lengths
    sizes = np.array([len(ring.ranks) for ring in plan.rings], dtype=np.float64)

    def mean_s(part: CostModel) -> float:
        seconds = ring_seconds(plan, lengths, part)
        return float(np.dot(seconds, sizes)) / plan.num_ranks

    busy_s = mean_s(cost)
    attention_s = mean_s(replace(NOTHING, a=cost.a))
    tokens_s = mean_s(replace(NOTHING, b=cost.b, fixed=given.padding_s))
    launch_s = mean_s(replace(NOTHING, fixed=cost.fixed - given.padding_s))
    kinds = given.per_token
    per_second = tokens_s / kinds.total if kinds.total else 0.0
    stage_s = timeline(plan, lengths, cost).total_s
    return StepTime(
        attention_s=attention_s + kinds.window * per_second,
        linear_s=kinds.linear * per_second,
        exchange_s=kinds.exchange * per_second,
        launch_s=launch_s,
        ring_s=busy_s - attention_s - tokens_s - launch_s,
        reduction_s=given.reduction_s,
        fill_s=step_s(plan, lengths, cost, problem.pipeline) - stage_s,
        imbalance_s=stage_s - busy_s,
    )
