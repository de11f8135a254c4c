"""Chunked pipelines: loss and gradients of one process, for any plan, without a hang."""

from dataclasses import replace

import numpy as np
import pytest
from test_hdp import LENGTHS, MOE, agree, gradients, oracle, random_plan

from megascale.planner import CostModel, Problem, plan_hybrid, step_s

PIPELINE = "parallel.pipeline="
AT_ONCE = 20
"""Plans that ranks run before they answer; a hang is found after the time that a call may take."""


def cut(plan, rng, stages, most=4):
    """An aligned plan with each wave cut into a random number of chunks, each sequence anywhere."""
    rings = []
    waves = sorted({ring.index for ring in plan.rings})
    first = 0
    for wave in waves:
        members = [ring for ring in plan.rings if ring.index == wave]
        chunks = int(rng.integers(1, most + 1))
        parts = {ring.id: cut_ring(ring, chunks, rng) for ring in members}
        begin = len(rings)
        for chunk in range(chunks):
            for place, ring in enumerate(members):
                made = replace(ring, id=len(rings), index=first + chunk)
                if chunks > 1:
                    sequences, spans = parts[ring.id][chunk]
                    made = replace(made, group=begin + place, chunk=chunk, chunks=chunks)
                    made = replace(made, sequences=sequences, spans=spans)
                rings.append(made)
        first += chunks
    made = replace(plan, rings=tuple(rings), pipeline=stages, capacity=10_000)
    made.check(LENGTHS)
    return made


def cut_ring(ring, chunks, rng):
    """Of each chunk, its sequences and the tokens of each; a chunk may have nothing of some."""
    parts = [{} for _ in range(chunks)]
    for sequence in ring.sequences:
        ends = sorted(rng.integers(0, LENGTHS[sequence] + 1, chunks - 1).tolist())
        ends = [0, *ends, LENGTHS[sequence]]
        for part, begin, end in zip(parts, ends, ends[1:]):
            if begin < end:
                part[sequence] = (begin, end)
    return [(tuple(part), tuple(part.values())) for part in parts]


def chunked_plans(seeds, num_ranks, stages, mode="aligned"):
    plans = [random_plan(seed, LENGTHS, num_ranks, mode) for seed in seeds]
    return [cut(plan, np.random.default_rng(seed), stages) for seed, plan in zip(seeds, plans)]


def cut_hybrid_plans(seeds, num_ranks, stages):
    """What the planner makes of the batch at random capacities and costs, cut."""
    plans = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        capacity = int(rng.integers(-(-max(LENGTHS) // num_ranks), 300))
        cost = CostModel(a=10 ** rng.uniform(-9, -6), b=1e-6)
        problem = Problem.of(LENGTHS, num_ranks, capacity, "aligned", cost, pipeline=stages)
        plans.append(cut(plan_hybrid(problem), rng, stages))
    return plans


def traced(overrides, plans, exact):
    """What `gradients` returns, and the passes of each plan as they ran."""
    from megascale.training import chunk_schedule

    kind, ran = chunk_schedule._Passes, []

    class Traced(kind):
        def __init__(self, *args):
            super().__init__(*args)
            ran.append([])

        def forward(self, index):
            ran[-1].append((False, index))
            super().forward(index)

        def backward(self, index):
            ran[-1].append((True, index))
            super().backward(index)

    chunk_schedule._Passes = Traced
    try:
        results = gradients(overrides, plans, exact)
    finally:
        chunk_schedule._Passes = kind
    from megatron.core import parallel_state as state

    stage = state.get_pipeline_model_parallel_rank()
    return results, stage, state.get_data_parallel_rank(), ran


def check(ranks, world, stages, overrides, plans, tolerance, exact):
    overrides = (f"{PIPELINE}{stages}", *overrides) if stages > 1 else tuple(overrides)
    expected_sums, expected = oracle(ranks, overrides, exact)
    answers = ranks(world, traced, overrides, plans, exact)
    agree([answer[0] for answer in answers], expected_sums, expected, tolerance)
    for _, stage, hdp_rank, ran in answers:
        cut_plans = [plan for plan in plans if any(r.chunks > 1 for r in plan.rings_of(hdp_rank))]
        assert ran == [plan.stage_order(hdp_rank, stage, stages) for plan in cut_plans]


@pytest.mark.parametrize(
    "world, stages, overrides",
    [(4, 2, []), (4, 4, ["model.num_layers=4"]), (1, 1, []), (4, 2, ["model.sliding_window=16"])],
)
def test_fp64_equals_one_process(ranks, world, stages, overrides):
    plans = chunked_plans(range(4), world // stages, stages)
    check(ranks, world, stages, overrides, plans, 1e-6, exact=True)


SPARSE = "model.moe.attention_experts=2"
LAYERS = ["model.sliding_window=16", "model.attention_pattern=[sliding, full_nope]"]
AFTER = ["model.norm_position=after", "model.qk_norm=true", "model.qk_norm_heads=all"]
SELECTIVE = "train.recompute=selective"


@pytest.mark.parametrize(
    "world, tensor, overrides",
    [
        (4, 1, []),
        (4, 1, ["train.recompute=full"]),
        (4, 2, []),
        (4, 2, ["parallel.sequence_parallel=false"]),
        (4, 1, [MOE]),
        (4, 1, [MOE, "model.moe.estimate=exact"]),
        (4, 1, [MOE, "parallel.expert=2"]),
        (4, 1, [MOE, SPARSE, "train.recompute=full"]),
        (4, 1, [*LAYERS, *AFTER, SELECTIVE]),
        (4, 1, [MOE, *LAYERS, SELECTIVE, "parallel.expert=2"]),
        (4, 2, [*LAYERS, *AFTER, "train.recompute=full"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_gradients_as_they_are_reduced(ranks, world, tensor, overrides):
    """Two stages, in fp32, with tied embeddings."""
    mode = "lockstep" if "parallel.expert=2" in overrides else "aligned"
    plans = chunked_plans(range(3), world // tensor // 2, 2, mode)
    check(ranks, world, 2, [*overrides, f"parallel.tensor={tensor}"], plans, 1e-4, exact=False)


def test_activations_in_host_memory(ranks):
    layers = "model.num_layers=6"
    for plan in chunked_plans(range(2), 2, 2):
        moved = replace(plan, rings=tuple(replace(ring, offload=0.7) for ring in plan.rings))
        check(ranks, 4, 2, [layers], [moved], 1e-4, exact=False)


def clocks(stages, plans, cost):
    """Seconds of each plan on this rank, as the clocks count that messages carry."""
    from test_hdp import BASE, VOCAB
    from timed_stages import run_plan

    from megascale.config import finalize, parse_config
    from megascale.model.build import transformer_config
    from megascale.runtime import distributed

    overrides = [f"{PIPELINE}{stages}", f"model.num_layers={stages}"]
    config = finalize(parse_config(BASE, overrides), {"random": 10000}, VOCAB)
    ranks = distributed.start(config)
    core = transformer_config(config, ranks)
    return [run_plan(plan, LENGTHS, cost, ranks, core, sleeps=False)[0] for plan in plans]


@pytest.mark.parametrize("world, stages", [(4, 2), (4, 4)])
def test_steps_take_what_is_predicted(ranks, world, stages):
    """Where a pass takes what the cost model says, and only that."""
    cost = CostModel(a=1e-7, b=1e-6, fixed=2e-5, latency=1e-5, prefix_intra=1e-6)
    plans = chunked_plans(range(8), world // stages, stages)
    plans = [plan for plan in plans if any(ring.chunks > 1 for ring in plan.rings)]
    measured = np.array(ranks(world, clocks, stages, plans, cost)).max(axis=0)
    predicted = [step_s(plan, LENGTHS, cost, stages) for plan in plans]
    np.testing.assert_allclose(measured, predicted, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world, stages", [(4, 2), (4, 4)])
def test_many_plans_end(ranks, world, stages, request):
    """Half of them random, half of the planner. More by --chunk-plans."""
    number = request.config.getoption("--chunk-plans") // 4
    plans = chunked_plans(range(100, 100 + number), world // stages, stages)
    plans += cut_hybrid_plans(range(number), world // stages, stages)
    assert any(
        ring.chunks > 1 and len(ring.ranks) == world // stages for p in plans for ring in p.rings
    )
    for begin in range(0, len(plans), AT_ONCE):
        some = plans[begin : begin + AT_ONCE]
        check(ranks, world, stages, ["model.num_layers=4"], some, 1e-4, exact=False)
