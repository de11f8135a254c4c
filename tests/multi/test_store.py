"""Setting up groups asks the store a number of times that grows as the ranks do, and no faster."""

import os

import pytest
from bench_store import BATCHED, count_run, gloo_operations, run_operations


@pytest.fixture(autouse=True)
def batched(monkeypatch):
    monkeypatch.setenv(BATCHED, "1")


def model(worlds):
    """What `run_operations` says; in a process of the pool, where megatron-core may be imported."""
    os.environ[BATCHED] = "1"
    return [run_operations(world) for world in worlds]


def test_a_group_asks_twice_for_each_rank(monkeypatch):
    assert [gloo_operations(n) for n in (2, 4, 8, 16, 32)] == [4, 8, 16, 32, 64]
    monkeypatch.setenv(BATCHED, "0")
    assert [gloo_operations(n) for n in (4, 8, 16)] == [36, 136, 528]  # 2 n^2 + n


def test_all_groups_of_a_run_grow_as_the_ranks_and_real_ranks_agree(ranks):
    (told,) = ranks(1, model, (2, 4, 8, 16))
    for n, total in zip((2, 4, 8, 16), told):
        assert total <= n * told[1] / 4 * 1.01
    for world, modelled in ((2, told[0]), (4, told[1])):
        real = sum(ranks(world, count_run))
        assert modelled <= real <= modelled + 4 * world  # and what joining asks
