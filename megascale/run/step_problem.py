"""What a planner is given for a step of a run, and the plan of the first one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from numpy.typing import ArrayLike

from megascale.config import Layout, RunConfig
from megascale.corpus.batches import Cursor, GlobalBatch, GlobalBatches
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo
from megascale.devices.memory import with_capacity
from megascale.devices.step_time import measured_cost, padding_s
from megascale.model import counts
from megascale.model.activations import layer_activation_bytes
from megascale.planner import CostModel, OffloadModel, Problem, StepPlan, plan_with


def cost_model(config: RunConfig) -> CostModel:
    """The cost model that steps of this run are planned with.

    Measured where `planner.cost` names a file (UserError where that cannot be used), else
    uncalibrated. The allgather dispatcher of experts pads every micro-batch to the full
    capacity, so there the part of the cost that grows with tokens is paid per micro-batch.
    """
    if config.planner.cost is not None:
        return measured_cost(config.planner.cost)
    cost = counts.default_cost(config.model, config.parallel.tensor)
    padded_s = padding_s(config, cost)
    return replace(cost, b=0.0, fixed=cost.fixed + padded_s) if padded_s else cost


def check_cost(config: RunConfig) -> None:
    """Raise UserError where `planner.cost` names a file that cannot be used."""
    if config.planner.cost is not None:
        measured_cost(config.planner.cost)


def offload_model(config: RunConfig, layout: Layout) -> OffloadModel | None:
    """What offload saves and costs a rank of this run; None where the config allows none."""
    copy_bytes_per_s = config.planner.host_copy_bytes_per_s
    if copy_bytes_per_s is None:
        return None
    return OffloadModel(
        stage_layers=config.model.num_layers // layout.pipeline,
        bytes_per_token=layer_activation_bytes(config, layout),
        copy_bytes_per_s=copy_bytes_per_s,
    )


def step_problem(
    config: RunConfig, layout: Layout, lengths: ArrayLike, cost: CostModel | None = None
) -> Problem:
    """What a planner is given for a step of this run with sequences of `lengths` tokens.

    `cost` takes the place of `cost_model`.
    """
    capacity = config.planner.capacity_tokens
    assert capacity is not None, "the config is not finalized"
    return Problem.of(
        lengths,
        layout.hdp,
        capacity,
        layout.mode,
        cost or cost_model(config),
        pipeline=layout.pipeline,
        expert_group=layout.expert,
        offload=offload_model(config, layout),
        budget_s=config.planner.budget_s,
        chunks=config.planner.chunks,
    )


def plan_lengths(config: RunConfig, layout: Layout, lengths: ArrayLike) -> StepPlan:
    """Plan sequences of `lengths` tokens as a step of this run would."""
    return plan_with(config.planner.name, step_problem(config, layout, lengths))


@dataclass(frozen=True)
class FirstStep:
    """The first step of a run and its plan."""

    batch: GlobalBatch
    plan: StepPlan
    problem: Problem
    """What it was planned for."""


def first_step(
    config: RunConfig,
    layout: Layout,
    sources: Mapping[str, SourceInfo],
    cost: CostModel | None = None,
) -> FirstStep:
    """Deal and plan step 0; see `plan_first`."""
    batch = next(following_batches(config, sources))
    return plan_first(config, layout, batch, cost)


def plan_first(
    config: RunConfig, layout: Layout, batch: GlobalBatch, cost: CostModel | None = None
) -> FirstStep:
    """Plan `batch` as step 0; `cost` takes the place of `cost_model`."""
    problem = step_problem(config, layout, batch.length, cost)
    return FirstStep(batch, plan_with(config.planner.name, problem), problem)


def batches_of(config: RunConfig, sources: Mapping[str, SourceInfo]) -> GlobalBatches:
    """All global batches of a run, as functions of the cursor."""
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    return GlobalBatches(config.data, shards, config.seed)


def following_batches(
    config: RunConfig, sources: Mapping[str, SourceInfo]
) -> Iterator[GlobalBatch]:
    """The batches of a run, from its first step on."""
    batches, cursor = batches_of(config, sources), Cursor()
    while True:
        batch, cursor = batches.next(cursor)
        yield batch


def with_shared_context(config: RunConfig, world: int) -> RunConfig:
    """`config` with as little capacity as the context allows: an equal share on each rank.

    So the longest sequence needs all ranks of the HDP axis, as on a cluster whose ranks are just
    enough for the context.
    """
    share = -(-config.data.context_tokens // Layout.of(config, world).hdp)
    return with_capacity(config, share)
