"""Chunked pipelines on CPU ranks: `python tools/bench.py pipeline [--stages N] [--hdp N]`.

Long-tailed batches in a pipeline, under plans of `hybrid` that may cut waves into chunks and under
those that may not. First the passes sleep as long as the cost model predicts, and all else is real:
how far is the step from its prediction? Then a model trains under both, in turn, on one thread a
rank: tokens per second. A pipeline saves time in which ranks wait. So the second part means
something only where every rank has a core of its own; the report says how many cores there are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_hdp import BATCH_TOKENS, BATCHES, CONTEXT, VOCAB, RandomText, batch_of

from megascale.config import finalize, parse_config
from megascale.planner import CostModel, Problem, StepPlan, plan_hybrid, step_s

CONFIG = f"""
model: {{hidden_size: 128, num_heads: 4, num_kv_heads: 2}}
data: {{sources: {{random: {{path: none}}}}, context_tokens: {CONTEXT}}}
planner: {{capacity_tokens: {CONTEXT // 2}}}
train: {{precision: fp32, tokens: 100M, threads: 1}}
"""
MOST_CHUNKS = 16
SLEPT = CostModel(a=5e-7, b=5e-4, fixed=0.05, latency=2e-3)
"""A step of the batches here takes ten seconds by it, so that messages are short beside sleeps."""
GOAL = 0.05
CALIBRATION_REPEATS, CALIBRATION_S = 3, 60.0
WHOLE, CHUNKED = "bench_pipeline:whole", "bench_pipeline:chunked"


def whole(problem: Problem) -> StepPlan:
    """A plan of whole sequences."""
    return plan_hybrid(replace(problem, chunks=1))


def chunked(problem: Problem) -> StepPlan:
    """A plan that may cut waves into chunks."""
    return plan_hybrid(replace(problem, chunks=MOST_CHUNKS))


def run_rank(stages: int, rounds: int, trains: bool, answer: Path) -> None:
    """What each rank does; the first writes the results to `answer`."""
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    overrides = [f"parallel.pipeline={stages}", f"model.num_layers={2 * stages}"]
    config = finalize(parse_config(CONFIG, overrides), {"random": BATCH_TOKENS}, VOCAB)
    ranks = distributed.start(config)
    results = {
        "stages": stages,
        "hdp": ranks.layout.hdp,
        "cores": len(os.sched_getaffinity(0)),
        "slept": _sleep(config, ranks, rounds),
        "trained": _train(config, ranks, rounds) if trains else [],
    }
    if ranks.rank == 0:
        answer.write_text(json.dumps(results), encoding="utf-8")
    distributed.stop()


def _problem(config: Any, ranks: Any, lengths: Any, cost: CostModel) -> Problem:
    layout, capacity = ranks.layout, config.planner.capacity_tokens
    pipeline = layout.pipeline
    return Problem.of(lengths, layout.hdp, capacity, layout.mode, cost, pipeline=pipeline)


def _sleep(config: Any, ranks: Any, rounds: int) -> list[dict[str, Any]]:
    """Steps whose passes sleep: predicted, by the clocks of messages, and as they were."""
    import torch
    import torch.distributed as dist
    from timed_stages import run_plan

    from megascale.model.build import transformer_config

    core, found = transformer_config(config, ranks), []
    lengths = [CONTEXT, *[64] * 8]
    plan = chunked(_problem(config, ranks, lengths, SLEPT))
    run_plan(plan, lengths, SLEPT, ranks, core, sleeps=False)  # makes what is made once
    for seed in range(rounds):
        lengths = BATCHES["tail"].draw(seed)
        problem = _problem(config, ranks, lengths, SLEPT)
        for name, plan in (("whole", whole(problem)), ("chunked", chunked(problem))):
            took = torch.tensor(run_plan(plan, lengths, SLEPT, ranks, core, sleeps=True))
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            predicted = step_s(plan, lengths, SLEPT, ranks.layout.pipeline)
            row = {"plan": name, "chunks": _chunks(plan), "predicted_s": predicted}
            found.append(row | {"clock_s": float(took[0]), "measured_s": float(took[1])})
    return found


def _train(config: Any, ranks: Any, rounds: int) -> list[dict[str, Any]]:
    """Steps of a model under both kinds of plans."""
    from megascale.mesh.reader import TokenSource
    from megascale.planner.fit import fit_cost
    from megascale.training.calibrate import calibrate
    from megascale.training.compare import Trainers, compare_planners

    done = calibrate(config, ranks, None, CALIBRATION_REPEATS, CALIBRATION_S, lambda line: None)
    cost = fit_cost(done.measurements, done.node_size).cost
    source = TokenSource("random", RandomText(), VOCAB - 1, VOCAB)  # type: ignore[arg-type]
    trainers = Trainers(config, ranks, [source], (WHOLE, CHUNKED))
    batches = [batch_of(BATCHES["tail"].draw(seed)) for seed in range(rounds + 1)]
    compared = compare_planners(
        trainers,
        (WHOLE, CHUNKED),
        batches,
        lambda lengths: _problem(config, ranks, lengths, cost),
        lambda planner: None,
    )
    return [
        {
            "chunks": _chunks(one.plans[CHUNKED]),
            "predicted": one.predicted_ratio(WHOLE, CHUNKED),
            "whole_s": one.steps[WHOLE].seconds,
            "chunked_s": one.steps[CHUNKED].seconds,
            "processor": one.steps[CHUNKED].processor_s / one.steps[WHOLE].processor_s,
            "loss_difference": one.loss_difference,
        }
        for one in compared
    ]


def _chunks(plan: StepPlan) -> list[int]:
    """Chunks of each wave."""
    return [ring.chunks for ring in plan.rings if ring.chunk == 0 and 0 in ring.ranks]


def launch(stages: int, hdp: int, rounds: int, trains: bool) -> dict[str, Any]:
    """Run this file on the ranks; what the first of them found."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(stages * hdp), __file__]
        command += [str(stages), str(rounds), str(int(trains)), str(answer)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        subprocess.run(command, check=True, env=environment)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def report(results: dict[str, Any]) -> None:
    """Print the parts that were measured."""
    stages, hdp = results["stages"], results["hdp"]
    print(f"{stages} stages x {hdp} ranks on {results['cores']} cores, batches of one sequence of")
    print(f"{BATCHES['tail'].describe()}; {BATCH_TOKENS:,} tokens in all")
    print("passes that sleep: plan, predicted s, measured s, over predicted, chunks of waves")
    for row in results["slept"]:
        over = row["measured_s"] / row["predicted_s"]
        chunks = " ".join(map(str, row["chunks"]))
        seconds = f"{row['predicted_s']:7.2f} {row['measured_s']:7.2f} {over:6.3f}"
        print(f"  {row['plan']:<8} {seconds}  {chunks}")
    worst = max(abs(row["measured_s"] / row["predicted_s"] - 1) for row in results["slept"])
    print(f"  furthest from the prediction: {worst:.1%} (goal: {GOAL:.0%})")
    rows = results["trained"]
    if not rows:
        return
    print("training: s of whole and chunked, tokens/s of both, ratio, that predicted, that of")
    print("processor time, chunks of waves")
    for row in rows:
        speeds = [BATCH_TOKENS / row[name] for name in ("whole_s", "chunked_s")]
        chunks = " ".join(map(str, row["chunks"]))
        seconds = f"{row['whole_s']:6.2f} {row['chunked_s']:6.2f}"
        ratios = row["whole_s"] / row["chunked_s"], row["predicted"], row["processor"]
        print(
            f"  {seconds} {speeds[0]:7.0f} {speeds[1]:7.0f}",
            *(f"{x:5.2f}x" for x in ratios),
            chunks,
        )
    ratio = statistics.median(row["whole_s"] / row["chunked_s"] for row in rows)
    apart = max(row["loss_difference"] for row in rows)
    print(f"  median: chunked plans {ratio:.2f}x as fast; losses differ by {apart:.1e}")


def bench_pipeline(options: Sequence[str] = ()) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.py pipeline", description=__doc__)
    parser.add_argument("--stages", type=int, default=2, help="pipeline stages; default: 2")
    parser.add_argument("--hdp", type=int, default=2, help="ranks of each stage; default: 2")
    parser.add_argument("--rounds", type=int, default=3, help="batches; default: 3")
    parser.add_argument("--sleep-only", action="store_true", help="train nothing")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(options)
    results = launch(args.stages, args.hdp, args.rounds, not args.sleep_only)
    report(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", Path(sys.argv[4]))
