"""A session-wide pool of worker processes that stand for ranks."""

import pytest
from hypothesis import HealthCheck, settings
from rank_pool import RankPools

# A busy machine must not fail a test, so examples have no limit of time. The examples of a test
# follow from its code alone, so a test that fails fails again. They may share its fixtures.
settings.register_profile(
    "megascale",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("megascale")


def pytest_addoption(parser):
    """How much of what has no end is tried."""
    parser.addoption("--chunk-plans", type=int, default=30, help="random plans with chunks")


@pytest.fixture(scope="session")
def rank_pools():
    """The pools of this session; ended with it."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(rank_pools):
    """`ranks(n, function, *args, timeout_s=300)`: what `function` returns on each of n ranks.

    The function must be importable: a top-level one of a test module. It may call
    `runtime.distributed.start`; it is followed by `stop`.
    """
    return rank_pools.run


@pytest.fixture(autouse=True, scope="module")
def hidden_devices(request):
    """Processes that a test starts run on CPU, also on a machine with GPUs; but those of tests/gpu
    see the devices."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "gpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
