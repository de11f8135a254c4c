"""How pictures look: colours, and numbers on axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.ticker import EngFormatter

COLOURS = ("#2166ac", "#d6604d", "#1b9e77", "#7b3294", "#e08214", "#4d4d4d", "#c51b7d", "#35978f")
MARKERS = "osD^vPX*"
ALARM = "#c0392b"
EARLIER = "#9a9a9a"
"""Of what an earlier run did."""
DASHES = (0, (4, 2))
STYLE: Any = {
    "agg.path.chunksize": 10_000,
    "axes.axisbelow": True,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.labelcolor": "#404040",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "figure.figsize": (9.0, 5.2),
    "font.size": 10.5,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "xtick.color": "#606060",
    "ytick.color": "#606060",
}


def colour(position: int) -> str:
    """The colour of the curve at a position, round and round."""
    return COLOURS[position % len(COLOURS)]


def count_units() -> EngFormatter:
    """Numbers on an axis with the suffixes of a config: 40K, 20B, not 40k, 20G."""
    from matplotlib.ticker import EngFormatter

    units = EngFormatter(sep="")
    units.ENG_PREFIXES = {**units.ENG_PREFIXES, 3: "K", 9: "B"}
    return units


def short_rate(lr: float) -> str:
    """A rate as people write it: 1.65e-4."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if lr else "0"
