"""The acceptance on several GPUs: one process each, started by `bash tools/gpus.sh`.

Parts: `plans` runs random plans under a watchdog, `bandwidth` compares what a ring sends in a hop
with what it computes, `overlap` switches the overlap of reductions off, `layouts` compares the
losses of TP, PP, EP and HDP. Without GPUs the ranks run on CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from gpu_rows import Rows

from megascale.runtime.distributed import prepare_device, world_from_environment

PARTS = ("plans", "bandwidth", "overlap", "layouts")
SMALL = "{num_layers: 4, hidden_size: 64, num_heads: 8, vocab_size: 512}"
LARGE = (
    "{num_layers: 4, hidden_size: 2048, num_heads: 16, num_kv_heads: 8, ffn_hidden_size: 8192, "
    "vocab_size: 32000}"
)
MOE = (
    "{num_layers: 4, hidden_size: 64, num_heads: 8, vocab_size: 512, "
    "moe: {num_experts: 8, top_k: 2, ffn_hidden_size: 64, balance: none}}"
)
PLAN_LIMIT_S = 60
"""A plan that takes longer is a hang: every rank prints where its threads are, and ends."""
STEPS = 3
"""Of each layout whose losses are compared."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a part on this rank; rank 0 prints and writes the rows. An error ends all ranks."""
    parser = argparse.ArgumentParser(prog="gpus.py", description=__doc__)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--plans", type=int, default=1000, help="random plans; default: 1000")
    parser.add_argument("--json", type=Path, default=Path("gpus.json"), help="default: gpus.json")
    parser.add_argument("--ended", type=int, help="write that the part ended with this status")
    arguments = parser.parse_args(words)
    part = arguments.part
    if arguments.ended is not None:
        Rows(arguments.json, part, keep=True).ended(arguments.ended)
        return 0
    small = prepare_device("auto")[0] == "cpu"
    rank, world, _ = world_from_environment()
    functions: dict[str, Callable[[Rows], None]] = {
        "plans": partial(plans, number=arguments.plans, world=world),
        "bandwidth": partial(bandwidth, world=world),
        "overlap": partial(overlap, world=world),
        "layouts": partial(layouts, world=world),
    }
    functions[part](Rows(arguments.json, part, small) if rank == 0 else Silent(part, small))
    return 0


class Silent(Rows):
    """The rows of a rank that neither prints nor writes."""

    def __init__(self, part: str, small: bool) -> None:
        self.part, self.small = part, small

    def add(self, *args: Any, **options: Any) -> None:
        """Nothing."""


def plans(rows: Rows, number: int, world: int) -> None:
    """Random plans: any ranks in any order, rings of every size."""
    from gpu_scene import config_of, learning

    generator, rings, slowest = np.random.default_rng(0), 0, 0.0
    with learning(config_of(SMALL if rows.small else LARGE, 1024)) as learner:
        for turn in range(number):
            plan, batch = random_plan(learner, generator, world, 256 if rows.small else 8192)
            rings += sum(len(ring.ranks) > 1 for ring in plan.rings)
            faulthandler.dump_traceback_later(PLAN_LIMIT_S, exit=True)
            began = time.perf_counter()
            train(learner, plan, batch)
            slowest = max(slowest, time.perf_counter() - began)
            if turn % 100 == 99 and learner.ranks.rank == 0:
                print(f"{turn + 1} plans", flush=True)
        faulthandler.cancel_dump_traceback_later()
    rows.add("random plans that ended, each token once", number, "", number)
    rows.add("rings of several ranks among them", rings, "", 1 if number > 2 else None)
    rows.add("slowest of these steps", slowest, "s")


def random_plan(learner: Any, generator: np.random.Generator, world: int, most: int) -> Any:
    """(plan, batch): sequences of up to `most` tokens on random rings."""
    from megascale.planner import Placed, complete
    from megascale.run.step_problem import step_problem

    lengths = np.clip(generator.lognormal(np.log(most / 8), 1.0, 3 * world), 2, most).astype(int)
    problem = step_problem(learner.config, learner.ranks.layout, lengths)
    problem = replace(problem, capacity=most)
    order, placed = generator.permutation(len(lengths)).tolist(), []
    while order:
        count = int(generator.integers(1, 4))
        sequences, order = order[:count], order[count:]
        least = -(-int(lengths[sequences].sum()) // most)
        size = int(generator.integers(min(least, world), world + 1))
        placed.append(Placed(generator.permutation(world)[:size].tolist(), sequences))
    plan = complete(problem, placed)
    plan.check(lengths)
    return plan, batch_of(lengths)


def batch_of(lengths: np.ndarray) -> Any:
    """A global batch of documents of these lengths."""
    zeros = np.zeros(len(lengths), np.int64)
    return SimpleNamespace(
        source=zeros, document=np.arange(len(lengths)), start=zeros, length=zeros + lengths
    )


class Documents:
    """Random tokens of documents, the same on every rank."""

    first_id = 0

    def read(self, document: int, start: int, length: int) -> Any:
        """Targets `start` to `start + length`, and the inputs before them."""
        from megascale.mesh.packing import TokenSequence

        ids = np.random.default_rng(document).integers(0, 500, start + length + 1)[start:]
        return TokenSequence(ids[:-1], ids[1:])


def train(learner: Any, plan: Any, batch: Any) -> float:
    """A step of this rank's part of a plan; the loss of all ranks.

    It raises where the ranks did not run every token once.
    """
    from megascale.training.reading import reader_of
    from megascale.training.step import train_step

    ranks, tokens = learner.ranks, int(batch.length.sum())
    micro_batches = reader_of(learner.config, ranks, [Documents()]).read(plan, batch)
    return train_step(
        learner, micro_batches, len(plan.rings_of(ranks.hdp_rank)), tokens, tokens
    ).loss


def bandwidth(rows: Rows, world: int) -> None:
    """What a ring of all ranks sends in a hop, against what it computes in it."""
    from gpu_scene import config_of, half, learning, seconds

    from megascale.mesh.packed_attention import attend
    from megascale.mesh.packing import Segments

    tokens = 128 if rows.small else 8192
    with learning(config_of(SMALL, 1024)) as learner:
        device, axis = learner.ranks.device, learner.ranks.axis
        place = axis.ranks.index(learner.ranks.rank)
        going = torch.ones(2, tokens, 8, 128, device=device, dtype=half(device))
        coming = torch.empty_like(going)

        def hop() -> None:
            to, origin = axis.ranks[(place + 1) % world], axis.ranks[place - 1]
            messages = [
                dist.P2POp(dist.isend, going, to, axis.group),
                dist.P2POp(dist.irecv, coming, origin, axis.group),
            ]
            for work in dist.batch_isend_irecv(messages):
                work.wait()

        sends = seconds(hop, device)
        q, k, v = (
            torch.randn(tokens, heads, 128, device=device, dtype=half(device))
            for heads in (32, 8, 8)
        )
        segments = Segments.of([tokens], device)
        # half of a causal square is what a rank computes of each hop of a ring
        computes = seconds(lambda: attend(q, k, v, segments), device)
    rows.add("keys and values of a hop", going.nbytes / sends / 1e9, "GB/s")
    ratio = sends / computes
    rows.add(f"sending over computing, {tokens} tokens a rank", ratio, "", None, 1, True)


def overlap(rows: Rows, world: int) -> None:
    """Reductions that overlap with the backward pass, and those that do not."""
    from gpu_scene import SMALL_TOKENS, config_of, learning, micro_batch, seconds, step

    from megascale.model import build

    plain, found = build.DistributedDataParallelConfig, {}
    tokens = SMALL_TOKENS if rows.small else 8192
    for name in ("on", "off"):

        def made(name: str = name, **options: Any) -> Any:
            if name == "off":
                options |= {"overlap_grad_reduce": False, "overlap_param_gather": False}
            return plain(**options)

        config = config_of(SMALL if rows.small else LARGE, tokens, "planner.name=longest_first")
        with patch.object(build, "DistributedDataParallelConfig", made), learning(config) as one:
            mine = [micro_batch(config, one.ranks.device, [tokens]) for _ in range(2)]
            losses: list[float] = []

            def both(one: Any = one, mine: Any = mine, losses: list[float] = losses) -> None:
                losses.append(step(one, mine, world))

            found[name] = seconds(both, one.ranks.device, repeats=STEPS), losses
    on, off = (np.array(found[name][1]) for name in ("on", "off"))
    error = float(np.abs(on / off - 1).max())
    rows.add("overlap on and off: relative difference of losses", error, "", None, tolerance(rows))
    rows.add("time of a step with overlap over that without", found["on"][0] / found["off"][0],
             "", None, 1.02, True)  # fmt: skip


def layouts(rows: Rows, world: int) -> None:
    """Losses of the same batches under other layouts of the ranks."""
    cuts = (
        ("HDP", SMALL, ()),
        ("TP", SMALL, (f"parallel.tensor={min(world, 8)}",)),
        ("PP", SMALL, (f"parallel.pipeline={min(world, 4)}",)),
        ("experts, HDP", MOE, ()),
        ("experts, EP", MOE, (f"parallel.expert={min(world, 8)}",)),
        ("experts, TP", MOE, (f"parallel.tensor={min(world, 8)}",)),
    )
    first: dict[str, np.ndarray] = {}
    for name, model, overrides in cuts:
        losses = np.array(losses_of(model, overrides))
        expected = first.setdefault(model, losses)
        error = float(np.abs(losses / expected - 1).max())
        rows.add(f"{name}: relative difference of {STEPS} losses", error, "", None, tolerance(rows))


def losses_of(model: str, overrides: Sequence[str]) -> list[float]:
    """Of some steps in this layout, as the planner lays them out."""
    from gpu_scene import config_of, learning

    from megascale.run.step_problem import plan_lengths

    generator, losses = np.random.default_rng(1), []
    with learning(config_of(model, 256, *overrides)) as learner:
        for _ in range(STEPS):
            lengths = np.clip(generator.lognormal(4.0, 1.0, 16), 2, 256).astype(int)
            plan = plan_lengths(learner.config, learner.ranks.layout, lengths)
            losses.append(train(learner, plan, batch_of(lengths)))
    return losses


def tolerance(rows: Rows) -> float:
    """Largest relative difference of losses: fp32 on CPU, bf16 on devices."""
    return 1e-4 if rows.small else 2e-2


if __name__ == "__main__":
    sys.exit(main())
