"""The memory that `megascale plan` says a rank needs is the peak of a whole step on the device."""

from dataclasses import replace

import pytest
from scene import MOE, scene

TOKENS = 8192
SHARED = MOE.replace("top_k: 2", "top_k: 2, shared_ffn_hidden_size: 4096")


def peak_and_plan(overrides, world, rank, offload=0.0):
    """(bytes at the peak of a step with full micro-batches, bytes by the plan) of this rank."""
    from megascale.model.activations import layer_activation_bytes
    from megascale.optim.rank_memory import stage_memory
    from megascale.planner.plan import kept_share

    with scene(*overrides, world=world, rank=rank) as found:
        layout, learner = found.learner.ranks.layout, found.learner
        stage = rank * layout.pipeline // world
        rings = [(range(layout.hdp), [TOKENS * layout.hdp])] * layout.pipeline
        for _ in range(2):  # the first step makes the optimizer's state
            batches = [replace(batch, offload=offload) for batch in found.read(*rings)]
            with found.device.counting() as counts:
                found.step(batches)
        assert bool(learner.model.offloader.blocks.num_blocks) == (offload > 0)
    planned = stage_memory(found.config, layout, stage).total
    layers = found.config.model.num_layers // layout.pipeline
    may_leave = TOKENS * layers * layer_activation_bytes(found.config, layout)
    return counts.peak_bytes, planned - (1 - kept_share(offload, layers)) * may_leave


@pytest.mark.parametrize(
    "overrides, world, rank",
    [
        ([], 1, 0),
        (["model.num_layers=4", "model.tied_embeddings=false"], 1, 0),
        (["train.recompute=full"], 1, 0),
        ([], 8, 3),
        (["train.recompute=full"], 8, 0),
        (["train.recompute=selective"], 1, 0),
        (["train.recompute=selective"], 8, 3),
        ([SHARED, "train.recompute=selective"], 1, 0),
        (["parallel.tensor=2"], 2, 1),
        (["parallel.tensor=2"], 4, 0),
        (["parallel.pipeline=2"], 2, 0),
        (["parallel.pipeline=2"], 2, 1),
        (["parallel.pipeline=2", "train.recompute=full"], 4, 0),
        (["parallel.pipeline=2", "model.ffn_hidden_size=2048"], 4, 0),
        (["parallel.tensor=2", "parallel.pipeline=2"], 4, 0),
        ([MOE], 1, 0),
        ([SHARED], 1, 0),
        ([MOE], 8, 3),
        ([MOE, "train.recompute=full"], 1, 0),
        ([MOE, "parallel.tensor=2"], 2, 1),
        ([MOE, "parallel.expert=2"], 2, 1),
        ([MOE, "parallel.expert=2", "parallel.tensor=2"], 4, 1),
        ([MOE, "parallel.pipeline=2"], 2, 0),
        ([MOE, "parallel.pipeline=2"], 2, 1),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else str(value),
)
def test_the_peak_of_a_step_is_what_the_plan_says(overrides, world, rank):
    peak, planned = peak_and_plan(overrides, world, rank)
    assert peak == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_offload_frees_what_the_plan_says(ratio):
    """All layers but two may leave, and none that has left is there while the head runs."""
    peak, planned = peak_and_plan(["model.num_layers=8"], 1, 0, ratio)
    assert peak == pytest.approx(planned, rel=0.05)
