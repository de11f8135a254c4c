"""A session-wide pool of worker processes that stand for ranks."""

import pytest
from rank_pool import RankPools


@pytest.fixture(scope="session")
def rank_pools():
    """The pools of this session; ended with it."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(rank_pools):
    """`ranks(n, function, *args, timeout_s=120)`: what `function` returns on each of n ranks.

    The function must be importable: a top-level one of a test module. It may call
    `runtime.distributed.start`; it is followed by `stop`.
    """
    return rank_pools.run
