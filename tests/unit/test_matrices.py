"""Weights one by one, and dealing them out, against counts and bounds."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_counts import DENSE, EVERY_MODEL, final, run_config

from megascale.config import Layout, TrainConfig
from megascale.config.optimizers import OPTIMIZERS
from megascale.model.counts import (
    RankParameters,
    count_rank_parameters,
    padded_vocab_size,
)
from megascale.model.matrices import Weight, weights
from megascale.optim.dealing import deal, kept_bytes
from megascale.optim.rank_memory import memory_per_rank
from megascale.optim.soap import weight_bytes

LAYOUTS = [
    Layout(world=1, tensor=1, pipeline=1, expert=1, hdp=1),
    Layout(world=4, tensor=2, pipeline=1, expert=2, hdp=2),
    Layout(world=4, tensor=1, pipeline=2, expert=1, hdp=2),
]


@EVERY_MODEL
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_add_up_to_the_parameters(name: str, layout: Layout) -> None:
    model = final(name)
    for stage in range(layout.pipeline):
        held = list(weights(model, layout, stage, padded_vocab_size(model, layout.tensor)))
        sums = [sum(math.prod(w.shape) for w in held if w.is_expert == e) for e in (False, True)]
        assert RankParameters(*sums) == count_rank_parameters(model, layout, stage)


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_dealing_is_within_the_greedy_bound(sizes: list[int], num_ranks: int) -> None:
    owners = deal(sizes, num_ranks)
    loads = [0] * num_ranks
    for owner, size in zip(owners, sizes, strict=True):
        loads[owner] += size
    assert sum(loads) == sum(sizes)
    assert max(loads) <= sum(sizes) / num_ranks + max(sizes, default=0)


def test_bytes_of_a_weight() -> None:
    assert weight_bytes(9, Weight((3, 5))) == 4 * (2 * 15 + 2 * 9 + 2 * 25)
    assert weight_bytes(9, Weight((6, 5), fused=2)) == 4 * (2 * 30 + 2 * (2 * 9 + 2 * 25))
    assert weight_bytes(9, Weight((7,))) == 4 * 2 * 7
    bf16 = run_config(DENSE, train=TrainConfig(precision="bf16"))
    assert kept_bytes(bf16, Weight((3, 5)), partial(weight_bytes, 4)) == 4 * (3 * 15 + 2 * 9)


def test_memory_of_soap() -> None:
    """DENSE is 8 wide: vectors, qkv 24x8, output 8x8, SwiGLU 2x12x8 and 8x12, embedding 16x8."""
    soap = replace(run_config(DENSE).optim, name="soap", soap_max_dim=12)
    config = run_config(DENSE, optim=soap, train=TrainConfig(precision="fp32"))
    alone = Layout(world=1, tensor=1, pipeline=1, expert=1, hdp=1)
    layer = [2 * 16, 2 * 192 + 128, 2 * 64 + 256, 2 * 192 + 2 * (288 + 128), 2 * 96 + 128 + 288]
    expected = 4 * (2 * sum(layer) + 2 * 8 + 2 * 128 + 128)
    assert memory_per_rank(config, alone).optimizer == expected
    four = replace(alone, world=4, hdp=4)
    dealt = memory_per_rank(config, four).optimizer
    assert expected / 4 <= dealt < expected / 4 + 4 * max(layer)
    whole = replace(config, optim=replace(soap, distributed_optimizer=False))
    assert memory_per_rank(whole, four).optimizer == expected


def test_bytes_are_counted_without_torch() -> None:
    """Of every optimizer, since `megascale plan` runs without torch."""
    script = """
import sys
sys.modules["torch"] = None
from megascale.config.optimizers import OPTIMIZERS
from megascale.optim.optimizer_kind import find_optimizer
print(*(name for name in OPTIMIZERS if find_optimizer(name).state.moments))
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stdout.split() == list(OPTIMIZERS), told.stderr
