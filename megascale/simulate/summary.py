"""What a simulation prints: its title, a row for each planner, and what the columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megascale.arrays import Integers
from megascale.devices.table import GIB
from megascale.simulate.cluster import OnPaper
from megascale.simulate.steps import size_labels


def title(lengths: str, cluster: OnPaper, batches: Sequence[Integers]) -> str:
    """What is simulated: the cluster, and the steps of `batches`, drawn from `lengths`."""
    layout = cluster.layout
    longest = max(int(batch.max()) for batch in batches)
    sequences = sum(map(len, batches)) / len(batches)
    return (
        f"{cluster.model_name} on {layout.world:,} x {cluster.device_name}: tensor "
        f"{layout.tensor}, pipeline {layout.pipeline}, expert {layout.expert}, {layout.hdp:,} HDP "
        f"ranks of {cluster.capacity:,} tokens, {cluster.mode} mode, offload {cluster.offload}\n"
        f"lengths {lengths}, cut at {cluster.context:,}: {len(batches)} steps of "
        f"{cluster.batch_tokens:,} tokens, {sequences:,.0f} sequences, the longest {longest:,}\n"
    )


def summary_lines(rows: Sequence[dict[str, Any]], cluster: OnPaper) -> list[str]:
    """The tables of `steps.replay_json`'s rows, with notes below."""
    return [*_table(rows), *_ring_sizes(rows, cluster), *_notes(cluster)]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each planner."""
    lines = [
        f"{'planner':<16} {'step':>9} {'tokens/s':>10} {'speed-up':>8} {'x bound':>8} {'idle':>6} "
        f"{'passing':>7} {'offload':>7} {'memory':>8} {'plan':>8}"
    ]
    for row in rows:
        if "problem" in row:
            lines.append(f"{row['planner']:<16} no plan: {row['problem']}")
            continue
        speedup = "n/a" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        lines.append(
            f"{row['planner']:<16} {_seconds(row['step_s']):>9} {_short(row['tokens_per_s']):>10} "
            f"{speedup:>8} {row['over_lower_bound']:>8.3f} {row['idle_share']:>6.1%} "
            f"{row['passing_share']:>7.1%} {row['offloaded_share']:>7.1%} "
            f"{row['peak_bytes'] / GIB:>4.0f} GiB {_seconds(row['plan_s']):>8}"
        )
    return lines


def _ring_sizes(rows: Sequence[dict[str, Any]], cluster: OnPaper) -> list[str]:
    labels = size_labels(cluster.layout.hdp)
    lines = ["", f"{'tokens in rings of':<18}" + "".join(f"{label:>11}" for label in labels)]
    for row in rows:
        if "problem" not in row:
            shares = row["tokens_by_ring_size"][: len(labels)]
            lines.append(f"{row['planner']:<18}" + "".join(f"{share:>11.1%}" for share in shares))
    return lines


def _notes(cluster: OnPaper) -> list[str]:
    return [
        "",
        "step, x bound: mean time, and over the mean lower bound; idle: waiting for other ranks;",
        "passing: waiting for keys and values; memory: of a device, an estimate, of "
        f"{cluster.device.memory_bytes / GIB:.0f} GiB; plan: time",
        f"of the planner on this machine. {cluster.rates()}",
        f"{cluster.device.source}.",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _short(number: float) -> str:
    for suffix in ("", "K", "M", "G"):
        if number < 1000 or suffix == "G":
            break
        number /= 1000
    return f"{number:.3g}{suffix}"
