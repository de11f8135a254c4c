"""Judges a plan from outside: `python tools/judge.py PLAN.json LENGTHS.txt COST.json`.

Written from the formulas of the cost file alone and without the planner's own code, so that the
two can be held against each other. A plan is the public JSON of `megascale plan --lengths`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from judge_bounds import Cost, bounds_s, kept_share
from judge_chunks import chunk_problems, stage_slots
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

COST_KEYS = ("a", "b", "fixed", "latency", "transfer_intra", "transfer_inter", "node_size")
MODES = ("free", "aligned", "lockstep")
FORWARD, BACKWARD = 1 / 3, 2 / 3


@dataclass(frozen=True)
class Verdict:
    """What a plan is worth by a cost model."""

    problems: tuple[str, ...]
    """Rules that the plan breaks; none for a valid plan."""
    free_s: float
    """Step time where ranks wait for nobody but the partners of their rings."""
    lock_s: float
    """Step time where the k-th micro-batches of all ranks begin together."""
    pipeline_s: float
    """Step time of 1F1B over the stages; infinite where the plan's order deadlocks it."""
    lower_bound_s: float
    """Seconds that no plan can beat, whatever its mode."""
    pipeline_bound_s: float
    """Seconds that no plan of whole sequences can beat with the stages of the pipeline."""

    def bound_s(self, mode: str) -> float:
        """The bound that counts in `mode`."""
        return self.pipeline_bound_s if mode == "aligned" else self.lower_bound_s

    def mode_s(self, mode: str) -> float:
        """The step time that counts in `mode`."""
        return {"free": self.free_s, "aligned": self.pipeline_s, "lockstep": self.lock_s}[mode]


def judge(
    plan: Mapping[str, Any],
    lengths: ArrayLike,
    cost: Cost,
    pipeline: int = 4,
    slowdown: ArrayLike | None = None,
) -> Verdict:
    """Check `plan` for sequences of `lengths` tokens and time it with `pipeline` stages.

    `slowdown` says how many times as long each rank takes, where that differs.

    `cost` is the content of a COST.json with exactly the keys COST_KEYS, in seconds of one
    pipeline stage. Raises ValueError for other keys. A plan that does not do the step (ranks or
    sequences that do not exist, sequences left out or done twice, a rank that waits for itself)
    gets infinite times.
    """
    if set(cost) != set(COST_KEYS):
        raise ValueError(f"cost has keys {sorted(cost)}; the neutral model knows {COST_KEYS}")
    tokens = np.asarray(lengths, dtype=np.int64)
    least_s = bounds_s(plan, tokens, cost, pipeline)
    flat = Flat.of(plan, tokens)
    problems = _not_the_step(flat, plan["num_ranks"], len(tokens))
    if problems:
        return Verdict(tuple(problems), *[float("inf")] * 3, *least_s)
    problems = _broken_rules(flat, plan) + chunk_problems(plan, tokens.tolist(), pipeline)
    seconds = _ring_seconds(flat, cost)
    if slowdown is not None:
        pace = np.zeros(len(seconds))
        np.maximum.at(pace, flat.rings, np.asarray(slowdown, dtype=np.float64)[flat.ranks])
        seconds = seconds * pace
    end_s, waves = _run_free(flat, seconds)
    slowest = np.zeros(int(waves.max(initial=-1)) + 1)
    np.maximum.at(slowest, waves, seconds)
    return Verdict(
        problems=tuple(problems),
        free_s=float(end_s.max(initial=0.0)),
        lock_s=float(slowest.sum()),
        pipeline_s=_run_pipeline(flat, seconds, pipeline),
        lower_bound_s=least_s[0],
        pipeline_bound_s=least_s[1],
    )


@dataclass(frozen=True)
class Flat:
    """A plan as arrays. Memberships are sorted by rank, those of one rank in execution order."""

    ids: Integers
    indices: Integers
    offload: Floats
    sizes: Integers
    """Ranks of each ring, [rings]."""
    sequences: Integers
    """Sequences of all rings, one ring after the other."""
    sequence_ring: Integers
    """Position of the ring that each of them is in."""
    begin: Integers
    """First token that the ring computes of each of them."""
    end: Integers
    """Where the tokens end that it computes."""
    chunks: Integers
    """Chunks of the group of each ring; 1 for whole sequences."""
    ranks: Integers
    """Rank of each membership."""
    rings: Integers
    """Position of the ring of each membership."""
    place: Integers
    """How many rings the rank has run before."""
    counts: Integers
    """How many rings the rank runs."""

    @staticmethod
    def of(plan: Mapping[str, Any], tokens: Integers) -> Flat:
        """Flatten the rings of a plan of sequences of so many tokens."""
        rings = plan["rings"]
        begin_end = np.array([span for ring in rings for span in _spans(ring, tokens)])
        begin, end = begin_end.astype(np.int64).reshape(-1, 2).T
        sizes = np.array([len(ring["ranks"]) for ring in rings], dtype=np.int64)
        held = np.array([len(ring["sequences"]) for ring in rings], dtype=np.int64)
        ranks = _chained(rings, "ranks")
        owner = np.repeat(np.arange(len(rings)), sizes)
        order = np.argsort(ranks, kind="stable")
        ranks = ranks[order]
        _, begins, counts = np.unique(ranks, return_index=True, return_counts=True)
        return Flat(
            ids=np.array([ring["id"] for ring in rings], dtype=np.int64),
            indices=np.array([ring["index"] for ring in rings], dtype=np.int64),
            offload=np.array([ring["offload"] for ring in rings], dtype=np.float64),
            sizes=sizes,
            sequences=_chained(rings, "sequences"),
            sequence_ring=np.repeat(np.arange(len(rings)), held),
            begin=begin,
            end=end,
            chunks=np.array([ring.get("chunks", 1) for ring in rings], dtype=np.int64),
            ranks=ranks,
            rings=owner[order],
            place=np.arange(len(ranks)) - np.repeat(begins, counts),
            counts=np.repeat(counts, counts),
        )


def _chained(rings: list[dict[str, Any]], key: str) -> Integers:
    return np.fromiter(chain.from_iterable(ring[key] for ring in rings), np.int64)


def _spans(ring: Mapping[str, Any], tokens: Integers) -> Iterator[tuple[int, int]]:
    """The tokens [begin, end) that a ring computes of each of its sequences."""
    if ring.get("chunks", 1) != 1:
        spans = [tuple(span) for span in ring.get("spans", ())]
        yield from (spans + [(0, 0)] * len(ring["sequences"]))[: len(ring["sequences"])]
        return
    known = len(tokens)
    yield from ((0, int(tokens[i]) if 0 <= i < known else 0) for i in ring["sequences"])


class Found(list[str]):
    """Problems found: a line each, with the first case and how many more there are."""

    def check(self, broken: NDArray[np.bool_], line: str, names: Integers) -> None:
        """Add `line` where anything is broken; `names` says what to call each case."""
        if np.any(broken):
            first = int(np.argmax(broken))
            self.append(f"{line}: {names[first]} and {int(broken.sum()) - 1} more")


def _not_the_step(flat: Flat, num_ranks: int, num_sequences: int) -> list[str]:
    """Why the plan cannot be timed as a step."""
    found = Found()
    found.check(flat.sizes == 0, "ring without ranks", flat.ids)
    twice = (np.diff(flat.ranks) == 0) & (np.diff(flat.rings) == 0)
    found.check(twice, "ring with a rank twice", flat.ids[flat.rings[1:]])
    unknown = (flat.ranks < 0) | (flat.ranks >= num_ranks)
    found.check(unknown, f"rank that none of {num_ranks} is", flat.ranks)
    unknown = (flat.sequences < 0) | (flat.sequences >= num_sequences)
    found.check(unknown, f"sequence that none of {num_sequences} is", flat.sequences)
    cut = flat.chunks[flat.sequence_ring] > 1  # whether chunks cover it is a rule of its own
    placed = [flat.sequences[~unknown & ~cut], np.unique(flat.sequences[~unknown & cut])]
    times = np.bincount(np.concatenate(placed), minlength=num_sequences)
    found.check(times == 0, "sequence not placed", np.arange(num_sequences))
    found.check(times > 1, "sequence placed more than once", np.arange(num_sequences))
    return found


def _broken_rules(flat: Flat, plan: Mapping[str, Any]) -> list[str]:
    """Rules that a plan breaks which can be timed all the same."""
    found = Found()
    found.check(np.diff(flat.ids) <= 0, "ring id not above the one before", flat.ids[1:])
    found.check((flat.offload < 0) | (flat.offload > 1), "offload outside 0 to 1", flat.ids)
    held = np.bincount(flat.sequence_ring, flat.end - flat.begin, len(flat.ids))
    kept = held * kept_share(flat.offload, plan.get("stage_layers", 2))
    over = kept > plan["capacity"] * flat.sizes * (1 + 1e-9)
    found.check(over, "ring above its capacity", flat.ids)
    falls = (np.diff(flat.ranks) == 0) & (np.diff(flat.indices[flat.rings]) <= 0)
    found.check(falls, "index does not increase on rank", flat.ranks[1:])
    if plan["mode"] not in MODES:
        found.append(f"mode {plan['mode']} is none of {', '.join(MODES)}")
    if plan["mode"] != "free":
        off = flat.indices[flat.rings] != flat.place
        line = "index is not the rank's count of micro-batches before, ring"
        found.check(off, line, flat.ids[flat.rings])
    if plan["mode"] == "lockstep":
        group = plan.get("expert_group", plan["num_ranks"])
        counts = np.bincount(flat.ranks, minlength=plan["num_ranks"])
        uneven = counts != counts[np.arange(len(counts)) // group * group]
        found.check(uneven, "rank with another count than its expert group", np.arange(len(counts)))
    return found


def _ring_seconds(flat: Flat, cost: Cost) -> Floats:
    """Seconds of each ring: what the cost file's keys say, term by term.

    A chunk attends to what is before it, so its squares are end^2 - begin^2. Its keys and values
    stay where they were computed.
    """
    num_rings = len(flat.ids)
    begin, end = flat.begin.astype(np.float64), flat.end.astype(np.float64)
    total = np.bincount(flat.sequence_ring, end - begin, num_rings)
    squares = np.bincount(flat.sequence_ring, end**2 - begin**2, num_rings)
    node = flat.ranks // int(cost["node_size"])
    lowest, highest = np.full(num_rings, np.iinfo(np.int64).max), np.zeros(num_rings, np.int64)
    np.minimum.at(lowest, flat.rings, node)
    np.maximum.at(highest, flat.rings, node)
    transfer = np.where(lowest == highest, cost["transfer_intra"], cost["transfer_inter"])
    transfer[flat.sizes == 1] = 0.0
    work = cost["a"] * squares + cost["b"] * total + transfer * total
    seconds: Floats = cost["fixed"] + cost["latency"] * np.log2(flat.sizes) + work / flat.sizes
    return seconds


def _run_free(flat: Flat, seconds: Floats) -> tuple[Floats, Integers]:
    """End of each ring, and the first wave in which all its ranks could run it."""
    after = np.flatnonzero(np.diff(flat.ranks) == 0)
    edges = flat.rings[after], flat.rings[after + 1]
    ends = _longest_paths(seconds, *edges)
    waves = _longest_paths(np.ones(len(seconds)), *edges).astype(np.int64) - 1
    return ends, waves


def _run_pipeline(flat: Flat, seconds: Floats, pipeline: int) -> float:
    """End of the step: every stage of every rank runs its own order, the ranks of a ring together.

    See `stage_slots`; without chunks it is 1F1B.
    """
    num_rings, num_members = len(seconds), len(flat.ranks)
    node_s = np.concatenate([FORWARD * seconds, BACKWARD * seconds] * pipeline)
    sources, targets = [], []
    rings = np.arange(num_rings)
    for stage in range(pipeline):
        forward = 2 * stage * num_rings
        backward = forward + num_rings
        forward_slot, backward_slot = _slots(flat, pipeline - 1 - stage)
        begin = 2 * (np.arange(num_members) - flat.place)
        order = np.empty(2 * num_members, dtype=np.int64)
        order[begin + forward_slot] = forward + flat.rings
        order[begin + backward_slot] = backward + flat.rings
        after = np.flatnonzero(np.diff(np.repeat(flat.ranks, 2)) == 0)
        last = stage == pipeline - 1
        next_forward = rings + (backward if last else forward + 2 * num_rings)
        sources += [order[after], forward + rings]
        targets += [order[after + 1], next_forward]
        if not last:
            sources.append(backward + 2 * num_rings + rings)
            targets.append(backward + rings)
    ends = _longest_paths(node_s, np.concatenate(sources), np.concatenate(targets))
    return float(ends.max(initial=0.0))


def _slots(flat: Flat, ahead: int) -> tuple[Integers, Integers]:
    """Places of the forward and the backward pass of each membership in the order of its rank."""
    begins = np.flatnonzero(flat.place == 0)
    known: dict[bytes, tuple[Integers, Integers]] = {}
    found = []
    for begin, end in zip(begins, [*begins[1:], len(flat.ranks)], strict=True):
        chunks = flat.chunks[flat.rings[begin:end]]
        key = chunks.tobytes()
        if key not in known:
            known[key] = stage_slots(chunks, ahead)
        found.append(known[key])
    forward, backward = zip(*found, strict=True) if found else ((flat.place,), (flat.place,))
    return np.concatenate(forward), np.concatenate(backward)


def _longest_paths(weights: Floats, sources: Integers, targets: Integers) -> Floats:
    """Heaviest path that ends in each node, itself included; infinite behind a cycle.

    Nodes are taken in generations: those all of whose sources are done.
    """
    num_nodes = len(weights)
    by_source = np.argsort(sources, kind="stable")
    targets = targets[by_source]
    degree = np.bincount(sources, minlength=num_nodes)
    begins = np.cumsum(degree) - degree
    waiting = np.bincount(targets, minlength=num_nodes)
    begin, end = np.zeros(num_nodes), np.full(num_nodes, np.inf)
    ready = np.flatnonzero(waiting == 0)
    while len(ready):
        end[ready] = begin[ready] + weights[ready]
        degrees = degree[ready]
        within = np.arange(int(degrees.sum())) - np.repeat(np.cumsum(degrees) - degrees, degrees)
        reached = targets[np.repeat(begins[ready], degrees) + within]
        np.maximum.at(begin, reached, np.repeat(end[ready], degrees))
        np.subtract.at(waiting, reached, 1)
        candidates = np.unique(reached)
        ready = candidates[waiting[candidates] == 0]
    return end


def main() -> int:
    """Print the verdict on one plan; exit 1 for an invalid one."""
    parser = argparse.ArgumentParser(prog="judge.py", description=__doc__)
    parser.add_argument("plan", type=Path, help="public JSON of a plan")
    parser.add_argument("lengths", type=Path, help="tokens of each sequence, one a line")
    parser.add_argument("cost", type=Path, help=f"JSON object with {', '.join(COST_KEYS)}")
    parser.add_argument("--pipeline", type=int, default=4, metavar="STAGES")
    options = parser.parse_args()
    lengths = np.loadtxt(options.lengths, dtype=np.int64, ndmin=1)
    plan, cost = (json.loads(path.read_text()) for path in (options.plan, options.cost))
    verdict = judge(plan, lengths, cost, options.pipeline)
    print(json.dumps(asdict(verdict), indent=1))
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
