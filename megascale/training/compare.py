"""Planners compared end to end: each trains a copy of one model, on the same batches, in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from megascale.config import RunConfig
from megascale.corpus.batches import GlobalBatch
from megascale.mesh.reader import TokenSource
from megascale.model.build import build_model
from megascale.monitor.comparison import Comparison, Round, Setting, TimedStep
from megascale.monitor.quantities import show_duration
from megascale.monitor.ratios import machine_busy_s
from megascale.optim.build import build_optimizer
from megascale.planner import CostModel, Problem, StepPlan, find_planner
from megascale.planner.chunk_order import chunks_of_waves
from megascale.planner.fit import fit_cost
from megascale.run.resolve import ResolvedRun
from megascale.run.step_problem import cost_model, following_batches, step_problem
from megascale.runtime.distributed import Ranks, device_name
from megascale.training.begin import token_sources
from megascale.training.calibrate import calibrate
from megascale.training.reading import reader_of
from megascale.training.step import Learner, train_step

CALIBRATION_S, CALIBRATION_REPEATS = 10.0, 2
TELL_EVERY_S = 5.0


class Trainers:
    """A model and an optimizer for each of some names, all of them with the same first weights."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, sources: Sequence[TokenSource], names: Iterable[str]
    ) -> None:
        """`config` is finalized; `sources` are in the order of `GlobalBatch.source`."""
        self.ranks = ranks
        self.reader = reader_of(config, ranks, sources)
        self.learners = {name: _learner(config, ranks) for name in names}
        self._tokens_seen = dict.fromkeys(self.learners, 0)

    def step(self, name: str, plan: StepPlan, batch: GlobalBatch) -> TimedStep:
        """Train the model `name` on `batch`; all ranks call it."""
        tokens = batch.num_tokens
        self._tokens_seen[name] += tokens
        micro_batches = self.reader.read(plan, batch)
        rings = plan.rings_of(self.ranks.hdp_rank)
        control, on_gpu = self.ranks.control, self.ranks.device.type == "cuda"
        dist.barrier(group=control)
        busy_s, began, worked = machine_busy_s(), time.perf_counter(), time.process_time()
        result = train_step(
            self.learners[name],
            micro_batches,
            len(rings),
            loss_tokens=tokens,
            tokens_seen=self._tokens_seen[name],
            waves=chunks_of_waves(rings),
            overlap=plan.ends_without_rings,
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


def compare_on_ranks(
    run: ResolvedRun,
    ranks: Ranks,
    baselines: Sequence[str],
    ours: str,
    repeats: int,
    say: Callable[[str], None],
) -> Comparison:
    """Measure planners on the first batches of a run, one of them to warm up; all ranks call it.

    Costs are measured first where the config names none. `say` gets lines for the user.
    """
    config, planners = run.config, (*baselines, ours)
    setting = _setting(config, ranks)
    for line in _introduction(config, setting):
        say(line)
    cost, error = _costs(config, ranks, say)
    batches = list(islice(following_batches(config, run.sources), repeats + 1))
    rounds = compare_planners(
        Trainers(config, ranks, token_sources(config, run.sources), planners),
        planners,
        batches,
        lambda lengths: step_problem(config, ranks.layout, lengths, cost),
        Progress(len(batches) * len(planners), say).show,
    )
    return Comparison(setting, tuple(baselines), ours, cost, error, rounds)


def _setting(config: RunConfig, ranks: Ranks) -> Setting:
    mine = len(os.sched_getaffinity(0))
    return Setting(
        ranks=ranks.world,
        device=device_name(ranks.device),
        cores=max(mine, os.cpu_count() or 1),
        usable_cores=min(mine, ranks.world * torch.get_num_threads()),
        precision=config.train.precision,
        capacity_tokens=config.planner.capacity_tokens or 0,
        context_tokens=config.data.context_tokens,
        corpora=tuple(dict.fromkeys(one.path for one in config.data.sources.values())),
    )


def _introduction(config: RunConfig, setting: Setting) -> Iterator[str]:
    model, ranks = config.model, setting.ranks
    yield "static context parallelism against hybrid data parallelism, on the same batches"
    yield (
        f"{ranks} ranks ({setting.device}, {setting.precision}), {model.num_layers} layers of "
        f"{model.hidden_size}, documents of {', '.join(setting.corpora)} in the order of a run"
    )
    yield (
        f"a rank holds {setting.capacity_tokens:,} tokens and the context is "
        f"{setting.context_tokens:,}: a static plan has one ring size for all sequences"
    )
    if setting.device == "cpu" and ranks > setting.usable_cores:
        yield (
            f"{ranks} ranks share {setting.usable_cores} cores: ratios show total work more than "
            "balance, since a rank that waits leaves its core to another rank"
        )


def _costs(
    config: RunConfig, ranks: Ranks, say: Callable[[str], None]
) -> tuple[CostModel, float | None]:
    """The cost model of the config, or one that is measured here, with the error of its fit."""
    if config.planner.cost is not None:
        return cost_model(config), None
    done = calibrate(
        config,
        ranks,
        None,
        CALIBRATION_REPEATS,
        CALIBRATION_S,
        lambda line: say(f"calibration, {line}"),
    )
    fit = fit_cost(done.measurements, done.node_size)
    error = float(np.median(np.abs(fit.left_out_errors)))
    say(f"calibrated in {done.seconds:.0f} s: predictions of micro-batches are {error:.0%} off")
    return fit.cost, error


class Progress:
    """Prints the number of the step and the time left, at most every `TELL_EVERY_S` seconds."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say, self._done = total, say, 0
        self._began = self._told = time.monotonic()

    def show(self, planner: str) -> None:
        """Count a step that begins."""
        now = time.monotonic()
        if self._done and now - self._told > TELL_EVERY_S:
            left_s = (now - self._began) / self._done * (self._total - self._done)
            eta = show_duration(left_s)
            self._say(f"step {self._done + 1} of {self._total} ({planner}), ETA {eta}")
            self._told = now
        self._done += 1
