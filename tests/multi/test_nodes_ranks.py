"""`megascale doctor --nodes` on real ranks: who is unfit is named, whatever is wrong with it."""

import dataclasses
import os
import time
from functools import partial
from unittest import mock

import pytest
import torch.distributed as dist

from megascale.runtime import nodes
from megascale.runtime.nodes import Options, run_rank
from megascale.runtime.self_test import cpu

LENIENT = 0.02
"""Of the median: only what the tests slow down is below it, however busy the machine."""


def examine(hosts, bad_rank, fault):
    """(outliers, what was measured) by rank 0; `bad_rank` has the fault of that name."""
    rank = int(os.environ["RANK"])
    options = Options(seconds=0.05, timeout_s=120.0, payload_bytes=1 << 16)
    small = mock.patch.object(nodes, "cpu", partial(cpu, size=64, memory_bytes=1 << 23))
    with mock.patch.dict(os.environ, SLURMD_NODENAME=hosts[rank]), small:
        if fault in ("absent", "hung"):
            options = dataclasses.replace(options, timeout_s=6.0)
        if rank == bad_rank and fault == "absent":
            return None
        with FAULTS[fault]() if rank == bad_rank else mock.patch.object(nodes, "LEAVE_S", 1.0):
            verdict = run_rank(options, {}, LENIENT)
    if verdict is None:
        return None
    outliers = [(one.host, one.rank, one.what) for one in verdict.outliers]
    return outliers, {name for one in verdict.reports for name in one.figures}


def device_with(**changes):
    made = dataclasses.replace(cpu(size=64, memory_bytes=1 << 23), **changes)
    return mock.patch.object(nodes, "cpu", lambda: made)


def slow_network():
    honest = dist.batch_isend_irecv

    def late(both):
        time.sleep(1)
        return honest(both)

    return mock.patch.object(dist, "batch_isend_irecv", late)


FAULTS = {
    "none": lambda: mock.patch.object(nodes, "LEAVE_S", 1.0),
    "absent": lambda: None,
    "slow": lambda: device_with(wait=lambda: time.sleep(0.2)),
    "wrong": lambda: device_with(fetch=lambda array: array.astype(float) + 1.0),
    "slow network": slow_network,
    "hung": lambda: mock.patch.object(
        nodes, "_together", lambda *given: time.sleep(30)
    ),  # longer than all wait for it
}


@pytest.mark.parametrize(
    ("hosts", "fault", "says"),
    [
        ("aabb", "none", []),
        ("aabb", "slow", ["matmul ", "memory "]),
        ("aabb", "wrong", ["matmul on cpu is wrong in 64 of 64 rows"]),
        ("aaaa", "slow network", ["in-node "]),
        ("abcd", "absent", ["no word from it"]),
        ("abcd", "hung", ["no word from it"]),
    ],
)
def test_a_bad_rank_is_named(rank_pools, hosts, fault, says):
    try:
        outliers, measured = rank_pools.run(4, examine, hosts, 2, fault)[0]
    finally:
        if fault in ("absent", "hung"):
            rank_pools.close()  # operations that nobody ended must not meet those of another test
    host = "?" if fault == "absent" else hosts[2]
    assert [one[:2] for one in outliers] == [(host, 2)] * len(says), outliers
    assert all(what.startswith(said) for (*_, what), said in zip(outliers, says)), outliers
    if fault == "none":
        wanted = "matmul memory loopback in-node between-nodes node-all-reduce all-reduce"
        assert measured == set(wanted.split())
