"""A run on a device that need not exist: its memory, its time, and changes with which it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd
from typing import NamedTuple, TypeVar

from numpy.typing import ArrayLike

from megascale.config import Layout, RunConfig
from megascale.devices.memory import auto_capacity, fullest, most_tokens, with_capacity
from megascale.devices.rates import LINK_EFFICIENCY
from megascale.devices.step_time import StepTime, step_cost, step_time
from megascale.devices.table import Device, DeviceMemory
from megascale.errors import UserError
from megascale.model.counts import batch_flops
from megascale.planner import Problem, StepPlan, plan_with
from megascale.planner.problem import MOST_RANKS
from megascale.run.step_problem import step_problem

D = TypeVar("D", bound=DeviceMemory)
DAY_S = 86_400
KINDS = ("recompute", "tensor", "ranks", "capacity", "offload")
"""Of changes, in the order in which several of them are made."""


class NamedDevice(NamedTuple):
    """A device by the name that the command line has for it."""

    name: str
    device: Device


@dataclass(frozen=True)
class Figures:
    """What a plan of a step means for a whole run."""

    time: StepTime
    num_tokens: int
    flops: int
    """Of the model in the step; what recomputation repeats does not count."""
    world: int
    peak_flops_per_s: float
    """Of one device."""

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        return self.num_tokens / self.time.total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the part of all devices' peak that the model's FLOPs take."""
        return self.flops / self.time.total_s / (self.world * self.peak_flops_per_s)

    def days(self, tokens: int) -> float:
        """Days to train on so many tokens."""
        return tokens / self.tokens_per_s / DAY_S

    def device_hours(self, tokens: int) -> float:
        """Hours of all devices added up."""
        return 24 * self.days(tokens) * self.world


def figures(
    config: RunConfig, layout: Layout, device: Device, plan: StepPlan, problem: Problem
) -> Figures:
    """What `plan` of `problem` means on this device."""
    return Figures(
        time=step_time(plan, problem, step_cost(config, layout, device)),
        num_tokens=int(problem.lengths.sum()),
        flops=batch_flops(config.model, problem.lengths, layout.tensor),
        world=layout.world,
        peak_flops_per_s=device.flops_per_s(config.train.precision),
    )


def planned_figures(
    config: RunConfig, layout: Layout, device: Device, lengths: ArrayLike, planner: str
) -> Figures:
    """The same, planned by a planner of this name. Raises UserError where it has no plan."""
    problem = step_problem(config, layout, lengths, step_cost(config, layout, device).cost)
    plan = plan_with(planner, problem)
    return figures(config, layout, device, plan, problem)


def static_figures(
    config: RunConfig, layout: Layout, device: Device, lengths: ArrayLike
) -> Figures | str:
    """Those of static context parallelism at its best, or why it cannot run this."""
    try:
        return planned_figures(config, layout, device, lengths, "static_best")
    except UserError as error:
        return str(error)


class Change(NamedTuple):
    """Options with which a run fits."""

    words: str
    """As on the command line."""
    needed: int
    """Bytes on the fullest stage."""
    figures: Figures


class _Tried(NamedTuple):
    words: tuple[str, ...]
    config: RunConfig
    layout: Layout


def changes_that_fit(
    config: RunConfig, layout: Layout, device: Device, lengths: ArrayLike
) -> list[Change]:
    """The fewest changes with which every stage fits and the lengths can be planned.

    Tried are a smaller capacity, one with offload, recomputation, more tensor ranks and more
    ranks: each alone, and where none is enough two and three of them together.
    """
    for number in (1, 2, 3):
        tried = [
            found
            for kinds in combinations(KINDS, number)
            if (found := _apply(kinds, config, layout, device)) is not None
        ]
        changes = list(_planned(tried, device, lengths))
        if changes:
            return _worth_it(changes)
    return []


def _worth_it(changes: list[Change]) -> list[Change]:
    """Of changes by time, without offload that is no faster than the same capacity without it."""
    listed: list[Change] = []
    for change in sorted(changes, key=lambda one: (one.figures.time.total_s, len(one.words))):
        words = set(change.words.split())
        if not any(set(before.words.split()) < words for before in listed):
            listed.append(change)
    return listed


def _apply(
    kinds: tuple[str, ...], config: RunConfig, layout: Layout, device: Device
) -> _Tried | None:
    """All of `kinds` in order; the last one must make the run fit."""
    steps = {
        "recompute": _recompute,
        "tensor": _more_tensor,
        "ranks": _more_ranks,
        "capacity": _less_capacity,
        "offload": _offload,
    }
    if {"capacity", "offload"} <= set(kinds):  # offload has a smaller capacity already
        return None
    return _in_order([steps[kind] for kind in kinds], _Tried((), config, layout), device)


def changes_for_auto(config: RunConfig, layout: Layout, device: DeviceMemory) -> list[str]:
    """The fewest changes, as on the command line, with which a capacity of `auto` has a value.

    Tried are recomputation, more tensor ranks and more ranks: each alone, then two, then three.
    """
    start = _Tried((), config, layout)
    for number in (1, 2, 3):
        tried = [
            _in_order(steps, start, device)
            for steps in combinations((_recompute, _more_tensor, _more_ranks), number)
        ]
        if any(tried):
            return [" ".join(one.words) for one in tried if one is not None]
    return []


def _in_order(
    steps: Iterable[Callable[[_Tried, D], _Tried | None]], tried: _Tried, device: D
) -> _Tried | None:
    """All of `steps`, of which the last one must make the run fit."""
    for step in steps:
        found = step(tried, device)
        if found is None:
            return None
        tried = found
    return tried if _fits(tried, device) else None


def _fits(tried: _Tried, device: DeviceMemory) -> bool:
    """Whether every stage fits, with some capacity where that is `auto`."""
    _, config, layout = tried
    if config.has_auto_capacity:
        return auto_capacity(config, layout, device) > 0
    return fullest(config, layout, device) <= device.memory_bytes


def _recompute(tried: _Tried, device: DeviceMemory) -> _Tried | None:
    train = tried.config.train
    if train.recompute == "full":
        return None
    config = replace(tried.config, train=replace(train, recompute="full"))
    return _Tried((*tried.words, "train.recompute=full"), config, tried.layout)


def _more_tensor(tried: _Tried, device: DeviceMemory) -> _Tried | None:
    """The fewest tensor ranks of a node with which it fits, or the most there can be."""
    model, cut = tried.config.model, tried.config.parallel
    common = gcd(model.num_heads, model.num_kv_heads or 1, model.ffn_hidden_size or 0)
    best = None
    for tensor in range(cut.tensor + 1, device.node_size + 1):
        if common % tensor:
            continue
        parallel = replace(cut, tensor=tensor, sequence_parallel=True)
        config = replace(tried.config, parallel=parallel)
        least = tensor * cut.pipeline * cut.expert
        world = max(1, round(tried.layout.world / least)) * least
        words = (*tried.words, f"parallel.tensor={tensor}")
        if world != tried.layout.world:
            words = (*words, f"--ranks {world}")
        best = _with_layout(words, config, world) or best
        if best and _fits(best, device):
            return best
    return best


def _more_ranks(tried: _Tried, device: DeviceMemory) -> _Tried | None:
    """Twice the ranks, and so on: the optimizer's state is cut over all of them."""
    world = tried.layout.world
    while (world := 2 * world) <= MOST_RANKS:
        words = (*(one for one in tried.words if not one.startswith("--ranks")), f"--ranks {world}")
        found = _with_layout(words, tried.config, world)
        if found and _fits(found, device):
            return found
    return None


def _less_capacity(tried: _Tried, device: Device) -> _Tried | None:
    tokens = most_tokens(tried.config, tried.layout, device)
    if not 0 < tokens < (tried.config.planner.capacity_tokens or 0):
        return None
    words = (*tried.words, f"planner.capacity_tokens={tokens}")
    return _with_layout(words, with_capacity(tried.config, tokens), tried.layout.world)


def _offload(tried: _Tried, device: Device) -> _Tried | None:
    """A smaller capacity, of which offload makes more."""
    planner = tried.config.planner
    if planner.host_copy_bytes_per_s is not None or planner.name != "hybrid":
        return None
    rate = device.host_bytes_per_s * LINK_EFFICIENCY
    config = replace(tried.config, planner=replace(planner, host_copy_bytes_per_s=rate))
    words = (*tried.words, f"planner.host_copy_bytes_per_s={rate:g}")
    return _less_capacity(_Tried(words, config, tried.layout), device)


def _with_layout(words: tuple[str, ...], config: RunConfig, world: int) -> _Tried | None:
    try:
        return _Tried(words, config, Layout.of(config, world))
    except UserError:
        return None


def _planned(tried: list[_Tried], device: Device, lengths: ArrayLike) -> Iterator[Change]:
    for words, config, layout in tried:
        try:
            found = planned_figures(config, layout, device, lengths, config.planner.name)
        except UserError:
            continue
        yield Change(" ".join(words), fullest(config, layout, device), found)
