"""The layout of ranks: which sizes of its axes fit a config and a number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megascale.config.schema import ModelConfig, RunConfig
from megascale.errors import UserError

MOST_DIVISOR = 100_000
"""Largest value that is tried for a suggestion."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes over which ranks are laid out; tensor * pipeline * hdp = world."""

    world: int
    tensor: int
    pipeline: int
    expert: int
    hdp: int

    @property
    def mode(self) -> Literal["free", "aligned", "lockstep"]:
        """Execution mode that the planner optimises (design, decision 6)."""
        if self.expert > 1:
            return "lockstep"
        return "aligned" if self.pipeline > 1 else "free"

    @staticmethod
    def of(config: RunConfig, world: int) -> Layout:
        """Layout of `config` on `world` ranks. Raises UserError where it does not fit."""
        cut = config.parallel
        model_ranks = cut.tensor * cut.pipeline
        if world < 1 or world % model_ranks:
            raise UserError(
                f"parallel.tensor * parallel.pipeline = {model_ranks} must divide the {world} "
                f"ranks started; start {model_ranks * max(1, world // model_ranks)} ranks, "
                f"or set {_nearest_cut(config, world)}"
            )
        hdp = world // model_ranks
        if hdp % cut.expert:
            raise UserError(
                f"parallel.expert = {cut.expert} must divide the HDP axis of {hdp} ranks "
                f"({world} ranks / tensor {cut.tensor} / pipeline {cut.pipeline}); "
                f"start {cut.expert * model_ranks} ranks, or set parallel.expert=1"
            )
        _require_room(config, hdp)
        return Layout(world, cut.tensor, cut.pipeline, cut.expert, hdp)


def _nearest_cut(config: RunConfig, world: int) -> str:
    """The nearest tensor and pipeline sizes that fit the model and `world` ranks, as overrides."""
    cut, model = config.parallel, config.model
    fits = [
        (tensor, pipeline)
        for tensor in divisors(math.gcd(*cut_by_tensor(model).values()))
        for pipeline in divisors(model.num_layers)
        if world % (tensor * pipeline) == 0
    ]
    tensor, pipeline = min(
        fits, key=lambda one: abs(one[0] - cut.tensor) + abs(one[1] - cut.pipeline)
    )
    words = [f"parallel.tensor={tensor}"] * (tensor != cut.tensor)
    return " ".join(words + [f"parallel.pipeline={pipeline}"] * (pipeline != cut.pipeline))


def _require_room(config: RunConfig, hdp: int) -> None:
    """The longest sequence must fit all ranks together, offload included."""
    context, capacity = config.data.context_tokens, config.planner.capacity_tokens
    if capacity is None or config.has_auto_capacity or context <= capacity * hdp:
        return
    capacity = capacity * _halves(config) // 2
    if context > capacity * hdp:
        raise UserError(
            f"data.context_tokens = {context} does not fit the {hdp} ranks of the HDP axis, "
            f"which hold {capacity} tokens each; set planner.capacity_tokens="
            f"{-(-context // hdp)} or above, or start more ranks"
        )


def _halves(config: RunConfig) -> int:
    """How many halves of its capacity a rank holds of one sequence, offload included."""
    if config.planner.host_copy_bytes_per_s is None:
        return 2
    return max(2, config.model.num_layers // config.parallel.pipeline)


def least_capacity(config: RunConfig, hdp: int) -> int:
    """The fewest tokens per rank with which `hdp` ranks hold the longest sequence."""
    if config.planner.name == "longest_first":
        return config.data.context_tokens
    share = -(-config.data.context_tokens // hdp)
    return -(-2 * share // _halves(config))


def divisors(whole: int) -> list[int]:
    """The divisors of `whole` up to `MOST_DIVISOR`, in order."""
    return [one for one in range(1, min(whole, MOST_DIVISOR) + 1) if whole % one == 0]


def cut_by_tensor(model: ModelConfig) -> dict[str, int]:
    """What parallel.tensor must divide, of a config that need not be finalized."""
    kv_heads = model.num_kv_heads or model.num_heads
    sizes = {"model.num_heads": model.num_heads, "model.num_kv_heads": kv_heads}
    ffn = model.ffn_hidden_size
    return sizes if ffn is None else sizes | {"model.ffn_hidden_size": ffn}
