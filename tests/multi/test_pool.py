"""The pool of ranks itself: results, exceptions and hangs are told apart."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPools


def all_reduce(value):
    dist.init_process_group("gloo")
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return int(total)


def fail_on_rank_1():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("this rank fails")


def hang_on_rank_1():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        time.sleep(600)


def die_on_rank_1():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os._exit(3)
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("world", [1, 2, 3, 2])
def test_results_of_all_ranks(ranks, world):
    assert ranks(world, all_reduce, 1) == [world + sum(range(world))] * world


def test_an_exception_comes_with_its_traceback(ranks):
    with pytest.raises(AssertionError, match="(?s)rank 1: .*this rank fails"):
        ranks(2, fail_on_rank_1)
    assert ranks(2, all_reduce, 0) == [1, 1]


def test_a_hang_ends_in_time_with_stacks(ranks):
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\] did not .*hang_on_rank_1"):
        ranks(2, hang_on_rank_1, timeout_s=20)
    assert ranks(2, all_reduce, 0) == [1, 1]


def test_a_rank_that_dies_is_named_at_once(ranks):
    with pytest.raises(AssertionError, match=r"of them died: \[1\]"):
        ranks(2, die_on_rank_1, timeout_s=10_000)  # longer than a test may take
    assert ranks(2, all_reduce, 0) == [1, 1]


def test_a_rank_that_is_killed_between_two_calls_is_replaced(rank_pools):
    (process,) = rank_pools.run(1, os.getpid)
    (worker,) = [one for one in multiprocessing.active_children() if one.pid == process]
    os.kill(process, signal.SIGKILL)
    worker.join()  # it is a zombie before its last thread has ended, and counts as alive until then
    assert rank_pools.run(2, all_reduce, 1) == [3, 3]


def visible_devices():
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_ranks_see_no_device_of_a_machine_that_has_some(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pools = RankPools()
    try:
        assert pools.run(1, visible_devices) == [""]
    finally:
        pools.close()


def test_programs_that_a_test_starts_see_none_either():
    assert visible_devices() == ""
