"""Seconds that no plan can beat, as the judge reckons them from a cost file alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Cost = Mapping[str, float]


def bounds_s(
    plan: Mapping[str, Any], tokens: ArrayLike, cost: Cost, stages: int
) -> tuple[float, float]:
    """The bounds for a plan's mode. With chunks a rank holds more tokens of a sequence than of a
    micro-batch, and several stages compute it at a time."""
    chunked = any(ring.get("chunks", 1) > 1 for ring in plan["rings"])
    held = plan["capacity"] * (stages if chunked else 1)
    bounded = tokens, plan["num_ranks"], held, cost, _gain(plan)
    lower_s = lower_bound_s(*bounded)
    if chunked:
        return lower_s, lower_s + (stages - 1) * cost["fixed"]
    return lower_s, pipeline_bound_s(*bounded, stages)


def kept_share(offload: ArrayLike, stage_layers: int) -> Floats:
    """Activations that stay on the device; the first and the last layer cannot leave it."""
    movable = max(0, stage_layers - 2) / max(2, stage_layers)
    return 1.0 - np.asarray(offload, dtype=np.float64) * movable


def _gain(plan: Mapping[str, Any]) -> float:
    """Times its capacity that a rank can hold; plans without `stage_layers` gain nothing."""
    return float(1.0 / kept_share(1.0, plan.get("stage_layers", 2)))


def lower_bound_s(
    lengths: ArrayLike, num_ranks: int, capacity: int, cost: Cost, gain: float = 1.0
) -> float:
    """Seconds that no plan can beat; `gain` is what offload adds to the capacity, at most.

    The larger of two: the cheapest rank-seconds of every sequence over all ranks, with the fixed
    time of as few micro-batches as hold the tokens; and the longest sequence on the ring that is
    best for it. A ring's latency is charged for the part of its capacity that a sequence fills.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    if not len(tokens):
        return 0.0
    held = capacity * gain
    fewest = _fewest(tokens, held, num_ranks)
    shared = np.maximum(fewest, 2)
    latency = cost["latency"] * np.log2(shared) / held
    extra = np.where(fewest == 1, 0.0, np.inf)
    if num_ranks > 1:
        within = shared <= min(cost["node_size"], num_ranks)
        extra = np.minimum(extra, np.where(within, cost["transfer_intra"] + latency, np.inf))
    if num_ranks > cost["node_size"]:
        extra = np.minimum(extra, cost["transfer_inter"] + latency)
    work = cost["a"] * tokens**2 + (cost["b"] + extra) * tokens
    even_s = work.sum() / num_ranks + cost["fixed"] * tokens.sum() / (num_ranks * held)
    return max(float(even_s), _longest_alone_s(tokens.max(), fewest.max(), num_ranks, cost))


def pipeline_bound_s(
    lengths: ArrayLike, num_ranks: int, capacity: int, cost: Cost, gain: float, stages: int
) -> float:
    """Seconds that no plan of whole sequences can beat on a pipeline of `stages`.

    The longest sequence passes all stages. The last stage waits until a first micro-batch has
    passed the others, and after its work a last one passes them again.
    """
    even_s = lower_bound_s(lengths, num_ranks, capacity, cost, gain)
    bound_s = even_s + (stages - 1) * cost["fixed"]
    tokens = np.asarray(lengths, dtype=np.float64)
    if not len(tokens):
        return bound_s
    fewest = _fewest(tokens.max(), capacity * gain, num_ranks)
    return max(bound_s, stages * _longest_alone_s(tokens.max(), float(fewest), num_ranks, cost))


def _fewest(tokens: ArrayLike, held: float, num_ranks: int) -> Floats:
    fewest: Floats = np.clip(np.ceil(np.asarray(tokens) / held - 1e-9), 1, num_ranks)
    return fewest


def _longest_alone_s(longest: float, fewest: float, num_ranks: int, cost: Cost) -> float:
    sizes = np.arange(int(fewest), num_ranks + 1)
    best = np.full(len(sizes), np.inf)
    for transfer, allowed in (
        (0.0, sizes == 1),
        (cost["transfer_intra"], (sizes > 1) & (sizes <= cost["node_size"])),
        (cost["transfer_inter"], (sizes > 1) & (num_ranks > cost["node_size"])),
    ):
        work = cost["a"] * longest**2 + (cost["b"] + transfer) * longest
        seconds = cost["fixed"] + cost["latency"] * np.log2(sizes) + work / sizes
        best = np.minimum(best, np.where(allowed, seconds, np.inf))
    return float(best.min())
