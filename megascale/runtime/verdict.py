"""Which ranks and pairs of ranks stand out among all that were tested."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_high

from megascale.errors import UserError

FLOPS, BYTES = "FLOP/s", "B/s"
UNITS = {
    "matmul": FLOPS,
    "memory": BYTES,
    "loopback": BYTES,
    "in-node": BYTES,
    "between-nodes": BYTES,
    "node-all-reduce": BYTES,
    "all-reduce": BYTES,
}
"""What is measured: products, copies in memory and TCP of a rank with itself, the middle of its
exchanges with ranks of its node and with other nodes, and sums over a node and over all."""
LEAST = {"cpu": 0.4, "cuda": 0.75}
"""Part of what is expected below which a rank stands out; CPU ranks get into each other's way."""


@dataclass(frozen=True)
class Report:
    """What one rank has found out."""

    rank: int
    host: str
    faults: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[int, float] = field(default_factory=dict)
    """Bytes/s in each direction with other ranks."""
    lost: str | None = None
    """Where it could not go on because of another rank, perhaps."""


@dataclass(frozen=True)
class Outlier:
    """What stands out, and of whom."""

    host: str
    rank: int
    what: str

    def __str__(self) -> str:
        return f"FAIL  node {self.host} rank {self.rank}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """What came of it all."""

    ranks: int
    expected: Mapping[str, float]
    """What was told, or else the median of the ranks."""
    outliers: tuple[Outlier, ...]
    reports: tuple[Report, ...]


def judge(
    reports: Sequence[Report], hosts: Mapping[int, str], least: float, told: Mapping[str, float]
) -> Verdict:
    """Who is faulty, silent, or below `least` of what is told, or else of the median.

    Of a slow pair the rank is named that is slow with most others, or, where neither is, the pair.
    `hosts` has every rank of the job, also those that gave no report.
    """
    spoke = {one.rank for one in reports}
    outliers = [Outlier(host, r, "no word from it") for r, host in hosts.items() if r not in spoke]
    outliers += [Outlier(one.host, one.rank, fault) for one in reports for fault in one.faults]
    if not outliers:  # else somebody is to blame for it
        outliers = [Outlier(one.host, one.rank, one.lost) for one in reports if one.lost]
    expected: dict[str, float] = {}
    slow: set[tuple[str, int]] = set()
    for name, unit in UNITS.items():
        known = _known(name, reports)
        if not known:
            continue
        middle = median_high(known.values())  # of two ranks the better one
        expected[name] = told.get(name, middle)
        for rank, figure in known.items():
            if not figure >= least * expected[name]:
                slow.add((name, rank))
                said = (
                    f"{name} {shown(figure, unit)}, median {shown(middle, unit)}, expected at "
                    f"least {shown(least * expected[name], unit)}"
                )
                outliers.append(Outlier(hosts[rank], rank, said))
    outliers += _slow_pairs(reports, hosts, least, expected, slow)
    return Verdict(len(hosts), expected, tuple(outliers), tuple(reports))


def _known(name: str, reports: Sequence[Report]) -> dict[int, float]:
    """A figure by rank; one, by the first of its ranks, where it is that of a node or of all."""
    groups: dict[object, list[Report]] = {}
    for one in reports:
        if name in one.figures:
            group = {"node-all-reduce": one.host, "all-reduce": None}.get(name, one.rank)
            groups.setdefault(group, []).append(one)
    return {
        ranks[0].rank: median_high(one.figures[name] for one in ranks) for ranks in groups.values()
    }


def _slow_pairs(
    reports: Sequence[Report],
    hosts: Mapping[int, str],
    least: float,
    expected: Mapping[str, float],
    slow: set[tuple[str, int]],
) -> list[Outlier]:
    """Pairs that are slow though none of the two is."""
    found = []
    for one in reports:
        for other, figure in one.links.items():
            kind = "in-node" if hosts[other] == one.host else "between-nodes"
            named = {(kind, one.rank), (kind, other)} & slow
            floor = least * expected.get(kind, 0.0)
            if one.rank < other and not named and figure < floor:
                said = (
                    f"with node {hosts[other]} rank {other} {shown(figure, BYTES)}, expected at "
                    f"least {shown(floor, BYTES)}"
                )
                found.append(Outlier(one.host, one.rank, said))
    return found


def shown(figure: float, unit: str) -> str:
    """A figure with a prefix: 1.2 TFLOP/s, 340 MB/s."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if figure >= size:
            return f"{figure / size:.3g} {prefix}{unit}"
    return f"{figure:.3g} {unit}"


def parse_expected(texts: Sequence[str]) -> dict[str, float]:
    """`matmul=600T` as {"matmul": 6e14}. Raises UserError."""
    told = {}
    for text in texts:
        name, _, value = text.partition("=")
        number, scale = value[:-1], {"T": 1e12, "G": 1e9, "M": 1e6}.get(value[-1:], 0.0)
        try:
            figure = float(number) * scale
        except ValueError:
            figure = 0.0
        if name not in UNITS or not (figure > 0 and math.isfinite(figure)):
            raise UserError(
                f"--expect {text}: write NAME=VALUE with a value such as 600T, 25G or 900M (in "
                f"FLOP/s or bytes/s); names: {', '.join(UNITS)}"
            )
        told[name] = figure
    return told


def describe(verdict: Verdict) -> str:
    """The verdict as a table of what was measured, and a line for each outlier."""
    hosts = {one.rank: one.host for one in verdict.reports}
    lines = [f"{verdict.ranks} ranks, nodes: {len(set(hosts.values()))}"]
    for name, expected in verdict.expected.items():
        known = _known(name, verdict.reports)
        who = min(known, key=known.__getitem__)
        middle = shown(median_high(known.values()), UNITS[name])
        lines.append(
            f"{name:<16} median {middle:<14} expected {shown(expected, UNITS[name]):<14} "
            f"least {shown(known[who], UNITS[name])} (node {hosts[who]} rank {who})"
        )
    lines += [str(one) for one in verdict.outliers] or ["no rank and no pair stands out"]
    return "\n".join(lines)
