"""Learning the map by which a model grows (G_learn), on the data that its run would read next."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megascale.checkpoint.load import Found
from megascale.checkpoint.tensors import Tensors
from megascale.config import Layout, ModelConfig, ParallelConfig, RunConfig
from megascale.convert.one_rank import for_one_rank, run_config
from megascale.corpus.batches import Cursor
from megascale.corpus.sources import SourceInfo, identity
from megascale.errors import UserError
from megascale.growth.learn import DepthMaps, Maps
from megascale.mesh.packing import MicroBatch
from megascale.model.build import build_model
from megascale.run.replay import part_seen
from megascale.run.resume import compare_sources
from megascale.run.step_problem import batches_of, plan_lengths
from megascale.runtime import distributed
from megascale.runtime.distributed import Ranks
from megascale.runtime.environment import world_from_environment
from megascale.training.begin import token_sources
from megascale.training.reading import reader_of
from megascale.training.step import Learner, run_micro_batches

LEARNING_RATE = 1e-2
"""Adam's, for the parts of layers, which begin as 0 and 1."""


@dataclass(frozen=True)
class Learned:
    """A learned map, and what it took."""

    maps: Maps
    cursor: Cursor
    """In the data, after what the map has learned from."""
    losses: tuple[float, ...]
    """Mean loss per token of each step's batch, before the step."""


def learn_maps(found: Found, grown: ModelConfig, factor: int, steps: int) -> Learned:
    """Learn the map from a checkpoint's model to `grown`, `factor` times as deep.

    Each step reads one global batch of the checkpoint's run, after what that has read. The grown
    model is built on this one process, with gradients and no optimizer; experts learn without
    a balance loss. Raises UserError under torchrun, and where the run's data is gone.
    """
    if world_from_environment()[1] != 1:
        raise UserError("--operator learn runs in one process; start it without torchrun")
    logging.getLogger("megatron").setLevel(logging.ERROR)  # there is no log file for its notices
    config = _config(found, grown)
    cursor, sources = _data(found, config)
    ranks = distributed.start(config)
    try:
        model = build_model(config, ranks)
        maps = DepthMaps(Tensors(found), model, factor)
        learner = Learner(config, ranks, model, None)
        batches = _Batches(config, sources, ranks, cursor)
        losses = tuple(_learn(learner, maps, batches, steps))
        return Learned({k: v.cpu() for k, v in maps.maps.items()}, batches.cursor, losses)
    finally:
        distributed.stop()


def _learn(learner: Learner, maps: DepthMaps, batches: _Batches, steps: int) -> Iterator[float]:
    adam = torch.optim.Adam(maps.maps.values(), lr=LEARNING_RATE)
    for _ in range(steps):
        maps.fill()
        learner.model.zero_grad_buffer()
        micro_batches, tokens = batches.next()
        loss_sum, _ran = run_micro_batches(learner, micro_batches, len(micro_batches))
        for key, gradient in maps.gradients().items():
            maps.maps[key].grad = gradient / tokens
        adam.step()
        yield float(loss_sum) / tokens


class _Batches:
    """The global batches of a run, as micro-batches of this one process."""

    def __init__(
        self, config: RunConfig, sources: dict[str, SourceInfo], ranks: Ranks, cursor: Cursor
    ) -> None:
        self._config, self.cursor = config, cursor
        self._batches = batches_of(config, sources)
        self._reader = reader_of(config, ranks, token_sources(config, sources))

    def next(self) -> tuple[list[MicroBatch], int]:
        """(micro-batches of the next global batch, its loss tokens)."""
        batch, self.cursor = self._batches.next(self.cursor)
        plan = plan_lengths(self._config, Layout.of(self._config, 1), batch.length)
        return list(self._reader.read(plan, batch)), batch.num_tokens


def _config(found: Found, grown: ModelConfig) -> RunConfig:
    """The run's config with the grown model, on one process and in fp32."""
    was = run_config(found)
    capacity = max(was.planner.capacity_tokens or 0, was.data.context_tokens)
    return replace(
        was,
        model=_unbalanced(for_one_rank(grown)),
        parallel=replace(ParallelConfig(), sequence_parallel=False),
        planner=replace(was.planner, name="longest_first", capacity_tokens=capacity, cost=None),
        optim=replace(was.optim, distributed_optimizer=False),
        train=replace(was.train, precision="fp32", recompute="none"),
    )


def _unbalanced(model: ModelConfig) -> ModelConfig:
    """Without a balance loss. (`loss_free` has none: its biases choose experts, and stay.)"""
    if model.moe is None or model.moe.balance == "loss_free":
        return model
    return replace(model, moe=replace(model.moe, balance="none"))


def _data(found: Found, config: RunConfig) -> tuple[Cursor, dict[str, SourceInfo]]:
    position = found.manifest.position
    if "data" not in position.cursor:
        raise UserError(
            f"{found.folder} has read no data that a map could be learned on; train it, or take "
            "--operator stack"
        )
    try:
        sources = {
            name: part_seen(SourceInfo.of(one), one) for name, one in config.data.sources.items()
        }
        now = {name: identity(info) for name, info in sources.items()}
        compare_sources(position.cursor["sources"], now)
    except UserError as error:
        raise UserError(f"--operator learn reads what {found.folder} has read: {error}") from None
    return Cursor.from_json(position.cursor["data"]), sources
