"""A process that starts and stops its ranks several times, as two calls of `train` do."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megascale.config import ModelConfig, RunConfig
from megascale.errors import RankError
from megascale.runtime import distributed

TIMES = 3


def sums(late):
    """What the ranks add up to, each time; rank `late` leaves when the others have gone on."""
    found = []
    for turn in range(TIMES):
        mine = distributed.start(RunConfig(model=ModelConfig()))
        total = torch.tensor([mine.rank + 1 + turn])
        dist.all_reduce(total)
        found.append(int(total))
        if mine.rank == late:
            time.sleep(1)
        distributed.stop()
        assert not dist.is_initialized()
    return found


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_stop_at_different_times_meet_again(ranks, late):
    assert ranks(2, sums, late, timeout_s=100) == [[3, 5, 7]] * 2


def test_the_same_under_torchrun():
    """Where the server of names is the agent's and outlives them all."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, __file__], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "[3, 5, 7]\n"), done.stderr


def in_a_world_of_the_caller():
    dist.init_process_group("gloo")
    for _ in range(TIMES):
        distributed.start(RunConfig(model=ModelConfig()))
        distributed.stop()
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    return int(total)


def without_variables():
    dist.init_process_group("gloo")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    with pytest.raises(RankError, match="rank . of 2 of a process group, and rank 0 of 1 by the"):
        distributed.start(RunConfig(model=ModelConfig()))


def test_a_process_group_of_other_ranks_is_one_line(ranks):
    ranks(2, without_variables)


def with_groups_of_megatron_core():
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    with pytest.raises(RankError, match="megatron-core's groups exist already"):
        distributed.start(RunConfig(model=ModelConfig()))


def test_groups_of_megatron_core_are_one_line(ranks):
    ranks(1, with_groups_of_megatron_core)


def test_a_process_group_that_the_caller_made_is_left_alone(ranks):
    assert ranks(2, in_a_world_of_the_caller) == [3, 3]


if __name__ == "__main__":
    found = sums(late=0)
    if os.environ["RANK"] == "0":
        print(found)
