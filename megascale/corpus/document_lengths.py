"""How long the documents of a corpus are: as text, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Floats, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_WIDTH = 40
"""Characters of the longest bar of the text."""
PICTURE_POWERS = 21
"""The picture goes up to 2**20 tokens at least, so that those of two corpora compare."""
WITHIN, LONGER, INK = "#4c72b0", "#dd8452", "#555555"
LEAST_LABEL = 0.005
"""Share from which a bar has its number above it."""


def powers_of(lengths: NDArray[Any]) -> Integers:
    """For each document the power of two up to which it is counted; 0 for one of a token."""
    powers: Integers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return powers


def length_histogram(lengths: NDArray[Any], context_tokens: int) -> str:
    """Documents and tokens by length, in powers of two, as text."""
    lines, total = [], max(1, int(lengths.sum(dtype=np.int64)))
    powers = powers_of(lengths)
    counts = np.bincount(powers)
    for power in range(int(powers.min()) if len(powers) else 0, len(counts)):
        share = int(lengths[powers == power].sum(dtype=np.int64)) / total
        bar = "#" * round(BAR_WIDTH * counts[power] / counts.max())
        lines.append(f"  to {2**power:>11,}  {counts[power]:>9,}  {share:>6.1%}  {bar}")
    longer = int(lengths[lengths > context_tokens].sum(dtype=np.int64)) / total
    head = f"  {'tokens':>14}  {'documents':>9}  {'tokens':>6}"
    tail = f"  {longer:.1%} of the tokens are in documents longer than {context_tokens:,} tokens"
    return "\n".join([head, *lines, tail])


def shares_by_length(lengths: NDArray[Any], context_tokens: int) -> tuple[Floats, Floats]:
    """(shares of documents, shares of tokens), each [2, powers of two].

    Row 0 is of the documents that a context holds, row 1 of the longer ones.
    """
    powers, is_longer = powers_of(lengths), (lengths > context_tokens).astype(np.int64)
    size = max(PICTURE_POWERS, int(powers.max(initial=0)) + 1)
    places = is_longer * size + powers
    documents = np.bincount(places, minlength=2 * size) / max(1, len(lengths))
    tokens = np.bincount(places, lengths, 2 * size) / max(1, lengths.sum(dtype=np.int64))
    return documents.reshape(2, size), tokens.reshape(2, size)


def plot_lengths(lengths: NDArray[Any], context_tokens: int, name: str, path: Path) -> None:
    """A picture of the same: shares of documents, and of tokens, by length.

    `name` is what the title calls the corpus. Raises OSError where `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    documents, tokens = shares_by_length(lengths, context_tokens)
    for axes, shares, what in zip(
        panels, (documents, tokens), ("documents", "tokens"), strict=True
    ):
        _draw_shares(axes, shares, what)
        axes.axvline(np.log2(context_tokens) + 0.5, color=INK, linestyle="--", linewidth=1)
    size = documents.shape[1]
    ticks = range(0, size, 2)
    panels[1].set_xticks(ticks, [_short(2**power) for power in ticks])
    panels[1].set_xlim(-0.6, size - 0.4)
    panels[1].set_xlabel("tokens of a document: up to this many, and more than half of it")
    total = int(lengths.sum(dtype=np.int64))
    title = f"Lengths of {name}: {len(lengths):,} documents, {total:,} tokens"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    inside, longer = (f"{part:.1%}" for part in tokens.sum(axis=1))
    labels = (
        f"within a context of {context_tokens:,}: {inside} of the tokens",
        f"longer: {longer} of the tokens",
    )
    handles = panels[0].containers[:2]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_shares(axes: Axes, shares: Floats, what: str) -> None:
    """Bars of two colours that stand on one another: within a context, and longer."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    floor = np.zeros(shares.shape[1])
    for part, colour in zip(shares, (WITHIN, LONGER), strict=True):
        axes.bar(range(len(part)), part, 0.86, floor, color=colour)
        floor = floor + part
    for power, share in enumerate(floor):
        if share >= LEAST_LABEL:
            axes.annotate(
                f"{share:.0%}", (power, share), xytext=(0, 2), textcoords="offset points",
                ha="center", fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_ylim(0, 1.12 * max(floor.max(), 0.01))
    axes.set_ylabel(f"share of {what}")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)


def _short(number: int) -> str:
    """A power of two as in a config: 512, 4Ki, 1Mi."""
    for unit in ("", "Ki", "Mi"):
        if number < 1024:
            return f"{number}{unit}"
        number //= 1024
    return f"{number}Gi"
