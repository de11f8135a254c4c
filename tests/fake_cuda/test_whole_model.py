"""The real model, its step and its optimizer on CUDA tensors that hold nothing: nothing fails, the
host waits for the device only where a list says so, and counts stay below their limits."""

import contextlib
from collections import Counter

import pytest
import torch
from measure import DENSE, EXPERTS, layers_of, micro_batch, step
from scene import MOE, scene

TOKENS = 8192
SELECTIVE = "train.recompute=selective"
READ = Counter({"tolist in training/step.py:_read": 1})
"""The values of a step, after the optimizer was launched."""
EXCHANGE = Counter({"tolist in model/dispatch.py:_agree": 1})
"""In each layer whose expert ranks exchange tokens: how many come and go."""
USE_OF_EXPERTS = Counter({"copy to host in model/balance.py:finish_sum": 1})
"""In each step, after the optimizer was launched too."""


def times(number, syncs):
    return Counter({what: number * count for what, count in syncs.items()})


@pytest.mark.parametrize(
    "overrides, world, rank, syncs",
    [
        ([], 1, 0, READ),
        (["train.recompute=full"], 1, 0, READ),
        ([SELECTIVE], 1, 0, READ),
        (["model.sliding_window=1000"], 8, 3, READ),
        (["model.sliding_window=1000", "model.attention_pattern=[sliding, full]"], 8, 3, READ),
        ([], 8, 0, READ),
        ([], 8, 7, READ),
        (["parallel.tensor=2"], 2, 1, READ),
        (["parallel.tensor=2"], 4, 1, READ),
        (["parallel.pipeline=2"], 2, 0, READ),
        (["parallel.pipeline=2"], 2, 1, READ),
        (["parallel.tensor=2", "parallel.pipeline=2"], 4, 0, READ),
        ([MOE, "parallel.pipeline=2"], 2, 0, READ + USE_OF_EXPERTS),
        ([MOE], 1, 0, READ + USE_OF_EXPERTS),
        ([MOE], 8, 3, READ + USE_OF_EXPERTS),
        ([MOE, "model.moe.estimate=buffer_corrected"], 1, 0, READ + USE_OF_EXPERTS),
        ([MOE, "parallel.tensor=2"], 2, 1, READ + USE_OF_EXPERTS),
        ([MOE, "parallel.expert=2"], 2, 1, READ + USE_OF_EXPERTS + times(2, EXCHANGE)),
        ([MOE, "parallel.expert=2", "parallel.tensor=2"], 4, 1,
         READ + USE_OF_EXPERTS + times(2, EXCHANGE)),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)  # fmt: skip
def test_the_host_waits_only_where_it_must(overrides, world, rank, syncs):
    """One micro-batch of a step, shared in a ring where there are several HDP ranks."""
    with scene(*overrides, world=world, rank=rank) as found:
        members = range(found.learner.ranks.layout.hdp)
        found.step(found.read((members, [TOKENS * len(members)])))  # makes what is made once
        with found.device.counting() as counts:
            found.step(found.read((members, [TOKENS * len(members)])))
        assert counts.syncs == syncs
        loads = found.learner.model.balance is not None  # of experts, for the next step
        assert counts.copies == Counter({"mesh/transfer.py:send": 1 + loads})
        rings = counts.messages["isend"] if "parallel.pipeline=2" not in overrides else 0
        assert bool(rings) == (len(members) > 1)


@pytest.mark.parametrize(
    "overrides, world, launches, gigabytes",
    [(DENSE, 1, 33, 10.62), (DENSE, 8, 141, 24.53), (MOE, 1, 99, 4.74), (EXPERTS, 1, 99, 14.2)],
    ids=["dense", "ring", "experts", "64 experts"],
)
def test_launches_and_bytes_of_a_layer(overrides, world, launches, gigabytes):
    """Of its forward and its backward pass. The limits are what was counted: they may only fall."""
    found = dict(layers_of("found", overrides, world))
    assert 0 < found["found: launches a layer"] <= launches
    assert 0 < found["found: GB a layer"] <= gigabytes


def test_a_step_beside_its_micro_batches():
    """The optimizer updates all weights in one kernel, and the norm is one more."""
    found = dict(step())
    assert found["optimizer: bytes a parameter"] <= 45
    assert found["step: host syncs beside micro-batches"] == 1
    assert found["optimizer of 14 weights: launches"] <= 60


@pytest.mark.parametrize(
    "overrides, world",
    [
        ([], 1),
        (["train.recompute=full"], 1),
        ([SELECTIVE], 1),
        ([EXPERTS, SELECTIVE], 1),
        ([MOE], 1),
        ([EXPERTS], 1),
        (["parallel.tensor=2"], 2),
        ([], 8),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_the_memory_of_activations_is_what_the_plan_says(overrides, world):
    from megascale.model.activations import activation_bytes

    with scene(*overrides, world=world) as found:
        layout = found.learner.ranks.layout
        _, counts = micro_batch(found, layout.hdp)
        planned = activation_bytes(found.config, layout, 0)
    assert counts.peak_bytes - counts.start_bytes == pytest.approx(planned, rel=0.05)


def test_a_deterministic_run_takes_a_step_and_leaves_torch_as_it_was():
    with scene("train.deterministic=true") as found:
        assert torch.are_deterministic_algorithms_enabled()
        found.step(found.read(((0,), [TOKENS])))
    assert not torch.are_deterministic_algorithms_enabled()
    with scene():
        assert not torch.are_deterministic_algorithms_enabled()


def test_micro_batches_are_padded_and_packed_for_one_copy():
    with scene() as found:
        (batch,) = found.read(((0,), [100, 200]))
    assert batch.tokens_T.shape == batch.loss_mask_T.shape == (384,)
    assert batch.num_tokens == batch.segments.num_tokens == 300
    assert batch.segments.lengths == (100, 200, 84)
    storage = batch.tokens_T.untyped_storage()._cdata
    parts = (batch.targets_T, batch.loss_mask_T, batch.segments.cu_seqlens)
    assert all(part.untyped_storage()._cdata == storage for part in parts)
    assert batch.segments.cu_seqlens.dtype == torch.int32


def test_attention_goes_through_calls_that_every_version_has():
    """The only attention there is, also where torch has no varlen_attn of this signature."""
    with scene() as found:
        batches = found.read(((0,), [TOKENS]))
        with found.device.counting() as counts:
            found.step(batches)
    assert counts.launches["_flash_attention_forward"] == 2
    assert counts.launches["_flash_attention_backward"] == 2


def test_a_save_copies_beside_the_next_step():
    """The host waits in the thread that writes, and the device before the update. What the step
    changes before its update is copied first."""
    from unittest.mock import patch

    from megascale.checkpoint import host_copy
    from megascale.checkpoint.boxes import boxes

    plain, copied, beside = host_copy._copy, {}, []

    @contextlib.contextmanager
    def stream(_):
        beside.append(True)
        yield
        beside.clear()

    def copy(pairs):
        copied[bool(beside)] = {box.key for box, _ in pairs}
        plain(pairs)

    with scene(MOE) as found, contextlib.ExitStack() as leave:
        learner = found.learner
        found.step(found.read(((0,), [TOKENS])))
        leave.enter_context(patch.object(torch.cuda, "stream", stream))
        leave.enter_context(patch.object(host_copy, "_copy", copy))
        leave.enter_context(patch.object(torch.Tensor, "is_pinned", lambda *_: True))
        held = boxes(learner.model, learner.optimizer, to_write=True)
        host = host_copy.HostCopy(held, learner.ranks.device)
        with found.device.counting() as counts:
            host.begin(learner.optimizer)
        assert not counts.syncs and len(learner.optimizer.readers) == 1
        with found.device.counting() as counts:
            found.step(found.read(((0,), [TOKENS])))
        assert counts.syncs == READ + USE_OF_EXPERTS and not learner.optimizer.readers
        with found.device.counting() as counts:
            assert len(host.finished()) == len(held)
        assert counts.syncs == Counter({"synchronize in checkpoint/host_copy.py:finished": 1})
    assert copied[False] | copied[True] == {box.key for box in held}
    assert all(key.endswith(("load_E", "earlier_E")) for key in copied[False]) and copied[False]
