"""Each answer that runtime.cpu gives in the place of CUDA."""

import importlib
import inspect
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megascale.runtime import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(autouse=True, scope="module")
def installed():
    cpu.install()
    cpu.install()


def test_the_current_device_is_the_cpu():
    assert torch.zeros(1, device=torch.cuda.current_device()).device == cpu.CPU


@pytest.mark.parametrize("name", ["set_device", "synchronize", "empty_cache"])
def test_device_management_does_nothing(name):
    assert getattr(torch.cuda, name)(0) is None


def test_nvtx_ranges_do_nothing():
    assert torch.cuda.nvtx.range_push("x") is None
    assert torch.cuda.nvtx.range_pop() is None


def test_streams_and_events_are_always_over():
    stream, event = torch.cuda.Stream(device="cuda"), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(event)
    assert stream.query() and event.query()
    assert stream.record_event().query()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
@pytest.mark.parametrize("name", cpu.FACTORIES)
def test_factories_with_a_cuda_device_make_cpu_tensors(name, device):
    like = torch.zeros(2)
    arguments = {
        "full": ((2,), 1.0),
        "full_like": (like, 1.0),
        "tensor": ([1.0, 2.0],),
        "as_tensor": ([1.0, 2.0],),
        "randint": (0, 2, (2,)),
    }
    args = arguments.get(name, (like,) if name.endswith("_like") else (2,))
    made = getattr(torch, name)(*args, device=device)
    assert made.device == cpu.CPU and made.shape == (2,)


def test_moving_to_cuda_stays():
    x = torch.ones(2)
    assert x.cuda() is x
    assert x.to("cuda") is x
    assert x.to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert x.to(torch.device("cuda")).device == cpu.CPU
    assert x.record_stream(torch.cuda.current_stream()) is None


def test_type_names_are_those_that_the_optimizers_compare_with():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_random_states_are_those_of_the_cpu():
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    random._set_cuda_rng_state(state)
    assert torch.equal(random._get_cuda_rng_state(), state)
    assert torch.equal(torch.cuda.random.get_rng_state(), state)


def test_compile_is_the_identity():
    def double(x):
        return 2 * x

    assert torch.compile(double) is double
    assert torch.compile(mode="max-autotune")(double) is double


def test_the_name_that_megatron_core_lacks_without_transformer_engine():
    from megatron.core.transformer.moe import moe_utils

    assert hasattr(moe_utils, "te_general_gemm")


def test_all_to_all_takes_tensors_as_split_sizes(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        out, sizes = torch.zeros(3), torch.tensor([3])
        dist.all_to_all_single(out, torch.arange(3.0), sizes, sizes)
        assert out.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()


def gloo_threads():
    """How many threads of gloo's devices this rank has, with many groups made."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    groups = [dist.new_group([0, 1]) for _ in range(20)]
    total = torch.ones(1)
    for group in groups:
        dist.all_reduce(total, group=group)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return total.item(), sum("tcp_loop" in name for name in names), len(groups)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_groups_share_a_device(ranks):
    for total, loops, groups in ranks(2, gloo_threads):
        assert total == 2**groups and loops == 1


def test_it_is_refused_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="has it"):
        cpu.install()


def test_kernels_of_megatron_core_are_not_missed_where_triton_is(monkeypatch):
    name = "megatron.core.transformer.moe.ops.paged_stash"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, name, None)
    cpu._do_without_triton()
    kernels = importlib.import_module(name)
    assert kernels.GLOBAL_BLOCK_SIZE == 1024 and kernels.paged_stash_copy_kernel is None


def test_gathers_and_scatters_of_unequal_sizes(ranks):
    gathered, scattered = zip(*ranks(2, gather_and_scatter))
    assert list(gathered) == [[0, 1, 1, 1]] * 2
    assert list(scattered) == [[3], [3, 3, 3]]


def gather_and_scatter():
    """Ranks 0 and 1 hold 1 and 3 elements."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    outputs = [torch.zeros(1), torch.zeros(3)]
    dist.all_gather(outputs, torch.full((1 + 2 * rank,), float(rank)))
    mine = torch.zeros(1 + 2 * rank)
    dist.reduce_scatter(mine, [torch.full((n,), 1.0 + rank) for n in (1, 3)])
    return torch.cat(outputs).tolist(), mine.tolist()


@pytest.mark.parametrize("name", ["arange", "empty", "zeros"])
def test_factories_follow_the_device_of_the_context(name):
    with torch.device("meta"):
        assert getattr(torch, name)(3).is_meta


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "all_to_all_single"])
def test_collectives_have_the_signature_of_torch(name):
    from torch.distributed import distributed_c10d

    ours = inspect.signature(getattr(torch.distributed, name), follow_wrapped=False)
    theirs = inspect.signature(getattr(distributed_c10d, name))
    described = [
        [(one.name, one.kind, one.default) for one in signature.parameters.values()]
        for signature in (ours, theirs)
    ]
    assert described[0] == described[1]


SIZES = {"equal": (2, 2, 2), "unequal": (1, 3, 2)}
GROUPS = ([0, 1, 2], [1, 2])
WAYS = ("keywords", "positions", "async")
OPERATIONS = {"SUM": np.sum, "MAX": np.max, "AVG": np.mean}
CASES = list(itertools.product(range(len(GROUPS)), SIZES, WAYS, OPERATIONS))


def reduced_and_gathered():
    """What this rank is left with in every case of CASES that it takes part in."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    groups = [dist.new_group(members) for members in GROUPS]
    return {
        case: (reduced(groups[case[0]], *case), gathered(groups[case[0]], *case))
        for case in CASES
        if dist.get_rank() in GROUPS[case[0]]
    }


def reduced(group, number, kind, way, operation):
    """In all parts rank r gives 1 + r + the place in the whole."""
    import torch.distributed as dist

    members, op = GROUPS[number], getattr(dist.ReduceOp, operation)
    sizes, rank = SIZES[kind][: len(members)], dist.get_rank()
    output = torch.zeros(sizes[members.index(rank)])
    inputs = list((torch.arange(sum(sizes)) + 1.0 + rank).split(sizes))
    if way == "positions":
        ended(way, dist.reduce_scatter(output, inputs, op, group, True))
    else:
        names = {"output": output, "input_list": inputs, "op": op, "group": group}
        ended(way, dist.reduce_scatter(async_op=way == "async", **names))
    return output.tolist()


def gathered(group, number, kind, way, operation):
    """Rank r gives r, once for each of its elements."""
    import torch.distributed as dist

    members, rank = GROUPS[number], dist.get_rank()
    sizes = SIZES[kind][: len(members)]
    mine = torch.full((sizes[members.index(rank)],), float(rank))
    # gloo itself wants each output in one piece of memory; ours need not be
    step = 2 if kind == "unequal" else 1
    outputs = [torch.zeros(step * size)[::step] for size in sizes]
    if way == "positions":
        ended(way, dist.all_gather(outputs, mine, group, True))
    else:
        names = {"tensor_list": outputs, "tensor": mine, "group": group}
        ended(way, dist.all_gather(async_op=way == "async", **names))
    return torch.cat(outputs).tolist()


def ended(way, handle):
    """Wait for a handle; only asynchronous calls return one."""
    assert (handle is None) == (way == "keywords")
    if handle is not None:
        handle.wait()


def test_collectives_honour_op_group_and_async_op(ranks):
    answers = ranks(3, reduced_and_gathered)
    for rank, answer in enumerate(answers):
        assert len(answer) == len(CASES) // (1 if rank else 2)
        for (number, kind, _, operation), found in answer.items():
            members = GROUPS[number]
            sizes = SIZES[kind][: len(members)]
            given = np.arange(sum(sizes)) + 1.0 + np.array(members)[:, None]
            parts = np.split(OPERATIONS[operation](given, axis=0), np.cumsum(sizes)[:-1])
            mine = parts[members.index(rank)].tolist()
            assert found == (mine, np.repeat(members, sizes).tolist()), (number, kind, operation)


def gather_too_few():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    tensors, said = [torch.zeros(1), torch.zeros(2)], []
    for collective in (dist.all_gather, lambda many, one: dist.reduce_scatter(one, many)):
        with pytest.raises(ValueError) as error:
            collective(tensors, tensors[0])
        said.append(str(error.value))
    return said


def test_too_few_tensors_of_unequal_sizes_are_refused(ranks):
    problem = "2 tensors for a group of 3 ranks; give one for each"
    assert ranks(3, gather_too_few) == [[problem] * 2] * 3
