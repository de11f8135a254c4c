"""Planners compared end to end: each trains a copy of one model, on the same batches, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megascale.config import RunConfig
from megascale.corpus.batches import GlobalBatch
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.build import build_model, pack_multiple
from megascale.monitor.comparison import Round, TimedStep
from megascale.monitor.ratios import machine_busy_s
from megascale.optim.build import build_optimizer
from megascale.planner import Problem, StepPlan, find_planner
from megascale.runtime.distributed import Ranks
from megascale.training.step import Learner, train_step


class Trainers:
    """A model and an optimizer for each of some names, all of them with the same first weights."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, sources: Sequence[TokenSource], names: Iterable[str]
    ) -> None:
        """`config` is finalized; `sources` are in the order of `GlobalBatch.source`."""
        self.ranks = ranks
        multiple, rank = pack_multiple(config), ranks.hdp_rank
        self.reader = MicroBatchReader(sources, rank, multiple, ranks.device, ranks.axis)
        self.learners = {name: _learner(config, ranks) for name in names}
        self._tokens_seen = dict.fromkeys(self.learners, 0)

    def step(self, name: str, plan: StepPlan, batch: GlobalBatch) -> TimedStep:
        """Train the model `name` on `batch`; all ranks call it."""
        tokens = batch.num_tokens
        self._tokens_seen[name] += tokens
        micro_batches = self.reader.read(plan, batch)
        count = len(plan.rings_of(self.ranks.hdp_rank))
        control, on_gpu = self.ranks.control, self.ranks.device.type == "cuda"
        dist.barrier(group=control)
        busy_s, began, worked = machine_busy_s(), time.perf_counter(), time.process_time()
        result = train_step(
            self.learners[name], micro_batches, count, tokens, self._tokens_seen[name]
        )
        if on_gpu:
            torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        processor = torch.tensor(time.process_time() - worked, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=control)
        dist.all_reduce(processor, group=control)
        others = torch.tensor(machine_busy_s() - busy_s, dtype=torch.float64) - processor
        dist.broadcast(others, 0, group=control)
        return TimedStep(float(slowest), float(processor), max(0.0, float(others)), result.loss)


def _learner(config: RunConfig, ranks: Ranks) -> Learner:
    model = build_model(config, ranks)
    return Learner(config, ranks, model, build_optimizer(config, model))


def compare_planners(
    trainers: Trainers,
    planners: Sequence[str],
    batches: Iterable[GlobalBatch],
    problem_of: Callable[[np.ndarray], Problem],
    show: Callable[[str], None],
) -> list[Round]:
    """Train on each batch under each of `planners`, whose trainers have their names; the rounds
    after the first, which allocates.

    Planners take turns within a round, and another one begins each round: what disturbs the machine
    for a while then disturbs all of them. Plans are made before the clock starts, since a run has
    them made ahead. `show` gets the planner before each step.
    """
    rounds = []
    for turn, batch in enumerate(batches):
        problem = problem_of(batch.length)
        plans = {name: find_planner(name)(problem) for name in planners}
        steps, first = {}, turn % len(planners)
        for name in [*planners[first:], *planners[:first]]:
            show(name)
            steps[name] = trainers.step(name, plans[name], batch)
        rounds.append(Round(batch, plans, {name: steps[name] for name in planners}))
    return rounds[1:]
