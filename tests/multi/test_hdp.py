"""The real model under any valid plan has the gradients of one process that runs everything.

Plans are drawn at random, or made to deadlock whoever runs rings in another order than by id or
waits before all is posted.
"""

from contextlib import nullcontext

import numpy as np
import pytest

from megascale.config import finalize, parse_config
from megascale.planner import CostModel, Placed, Problem, complete

BASE = """
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64}
data: {sources: {random: {path: none}}, context_tokens: 256}
planner: {capacity_tokens: 400}
optim: {distributed_optimizer: false}
train: {precision: fp32, tokens: 10000, threads: 1}
"""
VOCAB = 101
MODEL = "model."
LENGTHS = (40, 1, 23, 90, 2, 5, 61, 8, 3, 130)


class InMemory:
    """A shard whose documents are the sequences of one batch."""

    prefix = "in memory"

    def __init__(self, lengths):
        generator = np.random.default_rng(0)
        self.documents = [generator.integers(0, VOCAB - 1, n) for n in lengths]

    def read(self, document, start=0, count=None):
        return self.documents[document][start : start + count]


def whole_batch(lengths):
    from megascale.corpus.batches import GlobalBatch

    n = len(lengths)
    zeros = np.zeros(n, dtype=np.int64)
    length = np.array(lengths, dtype=np.int32)
    return GlobalBatch(0, zeros.astype(np.int16), np.arange(n), zeros, length)


def make_plan(lengths, num_ranks, mode, placed, pipeline=1):
    """A checked plan of (ranks, sequences) in execution order."""
    group = {"expert_group": 2} if mode == "lockstep" else {}
    cost = CostModel(a=1e-9, b=1e-6)
    problem = Problem.of(lengths, num_ranks, 400, mode, cost, pipeline=pipeline, **group)
    plan = complete(problem, [Placed(*one) for one in placed], 0.0)
    plan.check(lengths)
    return plan


def random_plan(seed, lengths, num_ranks, mode):
    """Sequences in random sets, each on a ring of random ranks in random order."""
    generator = np.random.default_rng(seed)
    order, placed = list(generator.permutation(len(lengths))), []
    while order:
        many = int(generator.integers(1, 4))
        size = int(generator.integers(1, num_ranks + 1))
        ring = tuple(int(r) for r in generator.permutation(num_ranks)[:size])
        placed.append((ring, tuple(int(i) for i in order[:many])))
        order = order[many:]
    return make_plan(lengths, num_ranks, mode, placed)


def bare(core, reduction, model):
    """The model without gradient buffers, which have no fp64."""
    import torch

    model.no_sync = nullcontext
    core.moe_router_dtype, core.pipeline_dtype = "fp64", torch.float64
    return model


def gradients(overrides, plans, exact=False, loads=None):
    """For each plan this rank's (loss sum, gradients by global name, place of its tensor part),
    summed over the HDP axis, and how many groups were made after start-up.

    `loads` are those of the experts of all layers in the batch before.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads

    from megascale.mesh.reader import MicroBatchReader, TokenSource
    from megascale.model import build
    from megascale.planner.chunk_order import chunks_of_waves
    from megascale.runtime import distributed
    from megascale.training.step import Learner, look, run_micro_batches

    config = finalize(parse_config(BASE, overrides), {"random": 10000}, VOCAB)
    ranks = distributed.start(config)
    wrap = build.DistributedDataParallel
    if exact:
        build.DistributedDataParallel = bare
    try:
        model = build.build_model(config, ranks)
    finally:
        build.DistributedDataParallel = wrap
    if exact:
        model.chunks[0].double()
    source = TokenSource("random", InMemory(LENGTHS), VOCAB - 1, VOCAB)
    reader = MicroBatchReader(
        [source],
        ranks.hdp_rank,
        build.pack_multiple(config, ranks.device),
        ranks.device,
        ranks.axis,
    )
    made, new_group = [], dist.new_group
    dist.new_group = lambda *args, **kwargs: made.append(1) or new_group(*args, **kwargs)
    results = []
    for layer in model.modules() if loads is not None else ():
        if hasattr(layer, "load_E"):
            layer.load_E.copy_(torch.tensor(loads[layer.layer_number - 1]))
    for plan in plans:
        if exact:
            model.chunks[0].zero_grad()
        else:
            model.zero_grad_buffer()
        micro_batches = reader.read(plan, whole_batch(LENGTHS))
        rings = plan.rings_of(ranks.hdp_rank)
        count = len(rings)
        learner = Learner(config, ranks, model, None)
        if model.balance is not None:
            if model.balance.looks_first:
                micro_batches = list(micro_batches)
                model.balance.adopt(look(learner, micro_batches, count))
            model.balance.begin(count, sum(LENGTHS))
        waves = chunks_of_waves(rings)
        sums = run_micro_batches(learner, micro_batches, count, waves=waves)
        dist.all_reduce(sums)
        if not exact:
            finalize_model_grads(model.chunks)
        results.append((sums.tolist(), _named(model, ranks, exact, config.model.num_layers)))
    dist.new_group = new_group
    return results, len(made)


def _named(model, ranks, exact, num_layers):
    """Gradients under the names they have in one process, with the part of the tensor axis."""
    import torch.distributed as dist
    from megatron.core import parallel_state as state

    cut, found = ranks.layout, {}
    layers = num_layers // cut.pipeline * state.get_pipeline_model_parallel_rank()
    experts = 4 // cut.expert * state.get_expert_model_parallel_rank()
    for name, weight in model.named_parameters():
        if exact:
            dist.all_reduce(weight.grad, group=ranks.axis.group)
            if cut.pipeline > 1 and ("embedding" in name or "output_layer" in name):
                dist.all_reduce(weight.grad, group=state.get_embedding_group())
        grad = (weight.grad if exact else weight.main_grad).detach().clone()
        words = name.removeprefix("module.").split(".")
        for key, offset in (("layers", layers), ("local_experts", experts)):
            if key in words:
                words[words.index(key) + 1] = str(int(words[words.index(key) + 1]) + offset)
        dim = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        part = (cut.tensor, state.get_tensor_model_parallel_rank(), dim)
        found[".".join(words)] = grad.double().numpy(), part
    return found


def shard(full, name, part):
    """The part of a gradient that one tensor rank holds; gate and up are cut one by one."""
    parts, place, dim = part
    if parts == 1 or dim is None:
        return full
    halves = np.split(full, 2, axis=dim) if "linear_fc1" in name else [full]
    return np.concatenate([np.split(half, parts, axis=dim)[place] for half in halves], axis=dim)


_ORACLES = {}


def oracle(ranks, overrides, exact):
    """Loss sum and gradients of one process that runs all sequences at once."""
    shape = tuple(o for o in overrides if o.startswith(MODEL))
    if (shape, exact) not in _ORACLES:
        plan = make_plan(LENGTHS, 1, "free", [((0,), (i,)) for i in range(len(LENGTHS))])
        [(results, _)] = ranks(1, gradients, shape, [plan], exact)
        _ORACLES[shape, exact] = results[0]
    return _ORACLES[shape, exact]


def check(ranks, world, overrides, plans, tolerance=1e-4, exact=False):
    expected_sums, expected = oracle(ranks, overrides, exact)
    answers = ranks(world, gradients, tuple(overrides), plans, exact)
    agree(answers, expected_sums, expected, tolerance)


def agree(answers, expected_sums, expected, tolerance):
    """Whether what all ranks found is what one process did."""
    seen = set()
    for results, groups_made in answers:
        assert groups_made == 0
        for sums, found in results:
            assert sums[1] == expected_sums[1] == sum(LENGTHS)
            assert abs(sums[0] - expected_sums[0]) < tolerance * expected_sums[0]
            seen |= set(found)
            for name, (grad, part) in found.items():
                name = "embedding.word_embeddings.weight" if "output_layer" in name else name
                full = expected[name][0]
                error = np.abs(grad - shard(full, name, part)).max()
                assert error <= tolerance * np.abs(full).max(), (name, error, np.abs(full).max())
    assert seen >= set(expected)


MOE = "model.moe.num_experts=4"
PATTERN = [
    "model.sliding_window=16",
    "model.local_rope_base=50",
    "model.attention_pattern=[sliding, full_nope]",
    "model.rope_scaling={kind: yarn, factor: 4, original_tokens: 32}",
]


@pytest.mark.parametrize(
    "world, mode, overrides",
    [
        (2, "free", []),
        (3, "free", []),
        (4, "free", []),
        (4, "free", ["model.sliding_window=16"]),
        (4, "free", PATTERN),
        (2, "free", ["train.recompute=full"]),
        (4, "free", ["parallel.tensor=2"]),
        (4, "free", ["parallel.tensor=2", "parallel.sequence_parallel=false"]),
        (4, "aligned", ["parallel.pipeline=2"]),
        (4, "aligned", ["parallel.pipeline=2", "train.recompute=full"]),
        (2, "lockstep", [MOE, "parallel.expert=2"]),
        (4, "lockstep", [MOE, "parallel.expert=2"]),
        (4, "lockstep", [MOE, "parallel.expert=2", "parallel.tensor=2"]),
        (4, "lockstep", [MOE, "parallel.expert=2", "parallel.pipeline=2"]),
        (2, "lockstep", [MOE, "parallel.expert=2", "model.moe.dispatcher=allgather"]),
        (2, "free", [MOE]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_random_plans(ranks, world, mode, overrides):
    model_parallel = sum(o in ("parallel.tensor=2", "parallel.pipeline=2") for o in overrides)
    num_ranks = world // 2**model_parallel
    plans = [random_plan(seed, LENGTHS, num_ranks, mode) for seed in range(4)]
    assert any(len(ring.ranks) > 1 for plan in plans for ring in plan.rings)
    check(ranks, world, overrides, plans)


def test_random_plans_in_fp64(ranks):
    """The loss itself is computed in fp32 by megatron-core, from logits that agree to 1e-15."""
    plans = [random_plan(seed, LENGTHS, 4, "free") for seed in range(4)]
    assert {len(ring.ranks) for plan in plans for ring in plan.rings} == {1, 2, 3, 4}
    check(ranks, 4, [], plans, tolerance=1e-6, exact=True)


def rest(placed, ranks):
    """Add the sequences that nothing holds yet, one by one, on `ranks` in turn."""
    held = {i for _, sequences in placed for i in sequences}
    free = [i for i in range(len(LENGTHS)) if i not in held]
    return [*placed, *(((ranks[n % len(ranks)],), (i,)) for n, i in enumerate(free))]


@pytest.mark.parametrize(
    "world, mode, overrides, placed",
    [
        # one rank has many micro-batches, the other few; the ring of both comes first, then last
        (4, "aligned", ["parallel.pipeline=2"], rest([((1, 0), (3,)), ((0, 1), (0,))], [0])),
        (4, "aligned", ["parallel.pipeline=2"], [*rest([], [0, 0, 1])[:-1], ((1, 0), (9,))]),
        # the other rank of the expert group has only padding beside its rings
        (2, "lockstep", [MOE, "parallel.expert=2"], rest([((1, 0), (3,)), ((0, 1), (4,))], [0])),
        # every pair of rings overlaps, in different directions
        (
            4,
            "free",
            [],
            rest(
                [((0, 1, 2), (3,)), ((3, 1, 0), (0, 1)), ((2, 3, 1), (6,)), ((0, 3, 2), (9,))], [1]
            ),
        ),
        # a ring waits for a rank that computes alone first, which waits for another ring
        (4, "free", [], rest([((2,), (9,)), ((1, 2), (3,)), ((0, 1), (6,)), ((3, 0), (1,))], [3])),
    ],
    ids=["aligned-first", "aligned-last", "lockstep", "rings-of-3", "chain"],
)
def test_plans_that_would_deadlock_a_naive_order(ranks, world, mode, overrides, placed):
    num_ranks = world // 2 if mode == "aligned" else world
    pipeline = 2 if mode == "aligned" else 1
    check(ranks, world, overrides, [make_plan(LENGTHS, num_ranks, mode, placed, pipeline)])
