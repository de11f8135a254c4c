"""Balance losses over ranks: the same gradients under any plan, and those of one process."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
from test_hdp import BASE, LENGTHS, MOE, VOCAB, agree, gradients, make_plan, random_plan

from megascale.config import MoeConfig

ALL = tuple(range(len(LENGTHS)))
STRONG = "model.moe.balance_weight=0.5"
"""So that what it adds to gradients is as large as what the language model does."""
LOADS = np.random.default_rng(0).dirichlet([1.0] * 4, 2) * 4


def one_by_one(ranks, overrides, exact, loads=None):
    """Loss sum and gradients of one process and a micro-batch for each sequence."""
    plan = make_plan(LENGTHS, 1, "free", [((0,), (i,)) for i in ALL])
    [(results, _)] = ranks(1, gradients, (MOE, *overrides), [plan], exact, loads)
    return results[0]


def at_once(ranks, overrides, exact, loads=None):
    """The same of one process and one micro-batch."""
    [(results, _)] = ranks(
        1,
        gradients,
        (MOE, *overrides),
        [make_plan(LENGTHS, 1, "free", [((0,), ALL)])],
        exact,
        loads,
    )
    return results[0]


def random_plans(num_ranks, mode):
    plans = [random_plan(seed, LENGTHS, num_ranks, mode) for seed in range(3)]
    assert any(len(ring.ranks) > 1 for plan in plans for ring in plan.rings)
    return plans


KINDS = {
    "given": (STRONG,),
    "given+z": (STRONG, "model.moe.z_loss_coeff=0.1"),
    "sequence": (STRONG, "model.moe.balance=sequence"),
    "exact": (STRONG, "model.moe.estimate=exact"),
}
"""Losses that do not depend on the plan."""


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_the_plan_in_fp64(ranks, kind):
    """Rings of up to 4, unequal numbers of micro-batches."""
    overrides = KINDS[kind]
    expected = one_by_one(ranks, overrides, True, LOADS)
    without = one_by_one(ranks, ("model.moe.balance=none",), True)
    router = "decoder.layers.0.mlp.router.weight"
    apart = np.abs(expected[1][router][0] - without[1][router][0]).max()
    assert apart > 0.1 * np.abs(without[1][router][0]).max()  # the loss is felt
    answers = ranks(4, gradients, (MOE, *overrides), random_plans(4, "free"), True, LOADS)
    agree(answers, *expected, tolerance=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_exact_is_one_process_with_one_micro_batch(ranks, exact):
    """There the batch is the micro-batch, whose balance megatron-core's kind of loss finds."""
    expected = at_once(ranks, (STRONG, "model.moe.balance=micro"), exact)
    overrides = (MOE, STRONG, "model.moe.estimate=exact")
    answers = ranks(3, gradients, overrides, random_plans(3, "free"), exact)
    agree(answers, *expected, tolerance=1e-6 if exact else 1e-4)


def test_one_micro_batch_makes_all_estimates_equal(ranks):
    expected = at_once(ranks, (STRONG, "model.moe.balance=micro"), True)
    for how in ("buffer", "buffer_corrected", "previous_corrected", "exact"):
        found = at_once(ranks, (STRONG, f"model.moe.estimate={how}"), True, LOADS)
        agree([([found], 0)], *expected, tolerance=1e-9)


@pytest.mark.parametrize("kind", ["given+z", "sequence", "exact"])
@pytest.mark.parametrize(
    "world, mode, cut",
    [
        (2, "free", ("train.recompute=full",)),
        (2, "lockstep", ("parallel.expert=2",)),
        (2, "lockstep", ("parallel.expert=2", "model.moe.dispatcher=allgather")),
        (4, "lockstep", ("parallel.expert=2", "parallel.tensor=2")),
        (4, "lockstep", ("parallel.expert=2", "parallel.pipeline=2", "train.recompute=full")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_layouts_and_recomputation_change_nothing(ranks, kind, world, mode, cut):
    overrides = KINDS[kind]
    expected = one_by_one(ranks, overrides, False, LOADS)
    model_parallel = sum(o in ("parallel.tensor=2", "parallel.pipeline=2") for o in cut)
    plans = random_plans(world // 2**model_parallel, mode)
    agree(ranks(world, gradients, (MOE, *overrides, *cut), plans, False, LOADS), *expected, 1e-4)


@pytest.mark.parametrize("balance", ["none", "loss_free"])
def test_the_language_model_teaches_routers_of_one_expert(ranks, balance):
    """Were weights to sum to 1, the weight of one would not depend on the router."""
    options = ("model.moe.top_k=1", f"model.moe.balance={balance}")
    _, found = one_by_one(ranks, options, True)
    grad, _ = found["decoder.layers.0.mlp.router.weight"]
    assert np.linalg.norm(grad) > 1e-3


def test_micro_balances_a_ring_as_one(ranks):
    """A ring of two holds one micro-batch, as one rank would."""
    overrides = (STRONG, "model.moe.balance=micro")
    expected = at_once(ranks, overrides, True)
    plan = make_plan(LENGTHS, 2, "free", [((1, 0), ALL)])
    agree(ranks(2, gradients, (MOE, *overrides), [plan], True), *expected, tolerance=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        "balance=micro",
        "balance=sequence",
        "balance=loss_free",
        *(f"estimate={how}" for how in get_args(get_type_hints(MoeConfig)["estimate"])),
    ],
)
def test_a_rank_of_padding_alone_changes_nothing(ranks, kind):
    """With experts on two ranks the other one runs as many micro-batches, all without a token."""
    weight = () if kind == "balance=loss_free" else (STRONG,)
    overrides = (*weight, f"model.moe.{kind}")
    expected = one_by_one(ranks, overrides, False, LOADS)
    plan = make_plan(LENGTHS, 2, "lockstep", [((0,), (i,)) for i in ALL])
    overrides = (MOE, *overrides, "parallel.expert=2")
    agree(ranks(2, gradients, overrides, [plan], False, LOADS), *expected, tolerance=1e-4)


# ----------------------------------------------------------------- megatron-core's loss, upstream


def upstream_gradient(per_token):
    """The gradient of a router by megatron-core's `global_aux_loss` alone, of 64 tokens that the
    ranks share evenly, reduced as its data parallelism does; and that by definition."""
    import torch
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    from megascale.config import finalize, parse_config
    from megascale.model.build import transformer_config
    from megascale.runtime import distributed

    config = finalize(parse_config(BASE, [MOE]), {"random": 10000}, VOCAB)
    ranks = distributed.start(config)
    core = transformer_config(config, ranks)
    core.moe_router_load_balancing_type, core.moe_aux_loss_coeff = "global_aux_loss", 1.0
    core.calculate_per_token_loss = per_token
    router = TopKRouter(core, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(router.weight.shape, generator=generator)
    tokens = torch.randn(64, 1, core.hidden_size, generator=generator)
    router.weight.data.copy_(weight)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # of the shape that its schedules set
    mine = tokens.chunk(ranks.world)[ranks.rank]
    probs, _ = router(mine)
    (0.0 * probs.sum()).backward()
    grad = router.weight.grad
    dist.all_reduce(grad)
    grad /= len(tokens) if per_token else ranks.world

    weight.requires_grad_(True)
    scores = torch.softmax(tokens[:, 0] @ weight.T, dim=-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
    (4 * chosen.mean(0) / 2 * scores.mean(0)).sum().backward()
    return float((grad * weight.grad).sum() / weight.grad.square().sum()), float(
        (grad / grad.norm() - weight.grad / weight.grad.norm()).norm()
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_upstream_scales_the_global_loss_by_one_over_the_ranks(ranks, per_token):
    """What users report is so, in megatron-core 0.16.1 and 0.19.2: the direction is right, and the
    weight is divided by the data-parallel size. With one rank it is right."""
    for world in (1, 2):
        for scale, off in ranks(world, upstream_gradient, per_token):
            assert scale == pytest.approx(1 / world, rel=1e-4)
            assert off < 1e-4
