"""Copies to a device, as far as a machine without CUDA can tell."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megascale.config import ModelConfig, ParallelConfig, PlannerConfig
from megascale.mesh import transfer
from megascale.mesh.kernels import Kernel
from megascale.mesh.packing import TokenSequence, pack
from megascale.mesh.ring_calls import arrays_of, calls_of, host_calls, with_tensors
from megascale.mesh.ring_share import RingShare
from megascale.planner.shares import chunk_bounds
from megascale.training.reading import reader_of

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.arange(3, dtype=np.int32),
    np.empty(0, dtype=np.int64),
    np.linspace(0, 1, 7, dtype=np.float32),
    np.array([9], dtype=np.int64),
]


def test_arrays_go_to_cuda_in_one_copy_and_keep_types_and_values(monkeypatch):
    sent = []
    monkeypatch.setattr(transfer, "send", lambda tensor, device: sent.append(device) or tensor)
    moved = transfer.send_arrays(ARRAYS, CUDA)
    assert sent == [CUDA]
    for tensor, array in zip(moved, ARRAYS):
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert (tensor.data_ptr() - moved[0].data_ptr()) % transfer.ALIGNED_BYTES == 0


def test_arrays_on_cpu_are_not_copied():
    for tensor, array in zip(transfer.send_arrays(ARRAYS, CPU), ARRAYS):
        assert np.shares_memory(tensor.numpy(), array) or not len(array)


def test_a_thread_makes_items_before_they_are_asked_for():
    made, third = [], threading.Event()

    def items():
        for item in range(5):
            made.append((item, threading.current_thread()))
            if item == 2:
                third.set()
            yield item

    taken = transfer.ahead(items(), CPU, number=3)
    assert third.wait(60)
    assert list(taken) == [0, 1, 2, 3, 4]
    assert all(thread is not threading.current_thread() for _, thread in made)


def test_what_a_thread_raises_is_raised_where_the_item_is_asked_for():
    def items():
        yield 1
        raise ValueError("a token outside the vocabulary")

    taken = transfer.ahead(items(), CPU)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="outside the vocabulary"):
        next(taken)


def listed(hops):
    """All values of calls, tensors and arrays as lists."""
    plain = [call._replace(cu_seqlens=None) for calls in hops for call in calls]
    bounds = [side for calls in hops for call in calls for side in call.cu_seqlens]
    values = [*(value for call in plain for value in call), *bounds]
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


@pytest.mark.parametrize("windows", [(None,), (5,), (5, None)])
def test_calls_of_a_ring_are_made_when_it_is_packed(monkeypatch, windows):
    """As attention would make them itself, and by the one copy of the micro-batch, also where
    layers have different windows."""
    grouped = Kernel(None, None, grouped=True)
    lengths, sent = [40, 7, 23], []
    bounds = chunk_bounds(lengths, 4)
    fresh = RingShare(1, bounds, (0, 1, 2, 3), None)
    expected = [calls_of(fresh, window, grouped, CPU) for window in windows]
    share = RingShare(1, bounds, (0, 1, 2, 3), None)
    monkeypatch.setattr(transfer, "send", lambda tensor, device: sent.append(device) or tensor)
    parts = [TokenSequence(np.zeros(n, np.int64), np.ones(n, np.int64)) for n in share.lengths()]
    batch = pack(parts, 0, 128, CUDA, share, windows=windows)
    assert len(sent) == 1 and batch.tokens_T.shape == (128,)
    found = [calls_of(share, window, grouped, CUDA) for window in windows]
    assert len(sent) == 1
    for own, others in zip(found, expected, strict=True):
        assert [len(calls) for calls in own] == [len(calls) for calls in others]
        assert listed(own) == listed(others) != []


def test_a_run_packs_for_the_windows_of_all_its_layers():
    pattern = ("sliding", "sliding", "full")
    model = ModelConfig(num_layers=6, sliding_window=5, attention_pattern=pattern)
    config = SimpleNamespace(model=model, planner=PlannerConfig(), parallel=ParallelConfig())
    config.pads_to_capacity = False
    ranks = SimpleNamespace(hdp_rank=0, device=CPU, axis=None)
    assert reader_of(config, ranks, []).windows == (5, None)


def test_with_tensors_is_the_inverse_of_arrays_of():
    share = RingShare(2, chunk_bounds([64, 9], 4), (0, 1, 2, 3), None)
    hops = host_calls(share, None)
    tensors = iter([torch.from_numpy(array) for array in arrays_of(hops)])
    placed = with_tensors(hops, tensors)
    assert next(tensors, None) is None
    assert arrays_of(placed) == [] != arrays_of(hops)
    assert listed(placed) == listed(hops)
