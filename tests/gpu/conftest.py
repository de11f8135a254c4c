"""Ranks on the CUDA devices of this machine."""

import pytest
from rank_pool import RankPools


@pytest.fixture(scope="session")
def rank_pools():
    """The pools of this session, in the place of those on CPU; ended with it."""
    pools = RankPools("cuda")
    yield pools
    pools.close()
