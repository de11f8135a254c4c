"""How experts are used: rows in `experts.jsonl`, a warning when routing collapses, heat maps.

Shape suffixes: L layers, E experts, S sources.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.arrays import Floats, Integers
from megascale.monitor.lines import LineFile
from megascale.monitor.metrics import read_rows, rewind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megascale.config import MoeConfig


EXPERTS_FILE = "experts.jsonl"
COLLAPSED_PART, COLLAPSED_STEPS = 0.8, 10
"""A layer has collapsed where one expert gets this part of all it could, or this part of the
experts gets nothing, in so many steps in a row."""

MOST_COLUMNS = 4
"""Heat maps beside one another."""


class CollapseWatch:
    """Notices when a router sends (nearly) everything to few experts."""

    def __init__(self, moe: MoeConfig) -> None:
        self._moe = moe
        self._steps: Integers | None = None

    def see(self, counts_LE: Floats) -> str | None:
        """Take the choices of a step; a warning when a layer has just collapsed, else None.

        Fewer tokens than experts show nothing, and stand for use as it should be.
        """
        num_experts, top_k = self._moe.num_experts, self._moe.top_k
        tokens_L = counts_LE.sum(axis=1) / top_k
        even = top_k / num_experts
        busy = counts_LE.max(axis=1) >= (even + COLLAPSED_PART * (1 - even)) * tokens_L
        idle = (counts_LE == 0).mean(axis=1) >= COLLAPSED_PART
        collapsed = (busy | idle) & (tokens_L >= num_experts) & (num_experts > top_k)
        before = self._steps if self._steps is not None else np.zeros(len(counts_LE), np.int64)
        self._steps = np.where(collapsed, before + 1, 0)
        layers = np.flatnonzero(self._steps == COLLAPSED_STEPS) + 1
        if not len(layers):
            return None
        worst = int(layers[0]) - 1
        share = counts_LE[worst].max() / tokens_L[worst]
        return (
            f"routing has collapsed in layer {', '.join(map(str, layers))}: for {COLLAPSED_STEPS} "
            f"steps few experts got nearly all; now one gets {share:.0%} of the tokens and "
            f"{(counts_LE[worst] == 0).sum()} of {num_experts} get nothing; {self._mend()}"
        )

    def _mend(self) -> str:
        """What would help."""
        if self._moe.balance in ("none", "loss_free"):
            return "set model.moe.balance=global or lower optim.lr"
        return "raise model.moe.balance_weight or lower optim.lr"


class ExpertLog:
    """Writes `experts.jsonl`; on resume after step `resume_step` later rows are dropped."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        rewind(run_dir / EXPERTS_FILE, resume_step)
        self._lines = LineFile(run_dir / EXPERTS_FILE)

    def write(self, step: int, sources: Sequence[str], counts_SLE: Floats) -> None:
        """Add a row: the choices of each source, and the share of each expert in them by layer."""
        totals = counts_SLE.sum(axis=2, keepdims=True)
        shares = np.divide(counts_SLE, totals, out=np.zeros_like(counts_SLE), where=totals > 0)
        row = {
            "step": step,
            "choices": [int(total) for total in totals[:, 0, 0]],
            "share": {
                name: np.round(one, 5).tolist() for name, one in zip(sources, shares, strict=True)
            },
        }
        self._lines.write(json.dumps(row))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def divergence_L(shares_SLE: Floats, weights_S: Floats | None = None) -> Floats:
    """How far sources differ in the experts they use, per layer: the Jensen-Shannon divergence.

    In bits; 0 where all use the same, at most log2 of the number of sources. Sources count
    alike unless `weights_S` says otherwise.
    """
    weights = np.ones(len(shares_SLE)) if weights_S is None else weights_S
    weights = weights / weights.sum()
    pooled = np.tensordot(weights, shares_SLE, axes=1)
    return _entropy(pooled) - np.tensordot(weights, _entropy(shares_SLE), axes=1)


def _entropy(shares: Floats) -> Floats:
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy: Floats = -(shares * logs).sum(axis=-1)
    return entropy


def read_shares(run_dir: Path) -> tuple[int, list[str], Floats] | None:
    """(step, sources, shares) of the last row of a run, [S, L, E]; None where there is none.

    Sources without a token in that step are left out.
    """
    path = run_dir / EXPERTS_FILE
    rows = read_rows(path) if path.exists() else []
    found = (_shares_of(row) for row in reversed(rows))
    return next((one for one in found if one is not None), None)


def _shares_of(row: Mapping[str, Any]) -> tuple[int, list[str], Floats] | None:
    """What `read_shares` returns, of one row; None where it is not as `ExpertLog` writes it."""
    share, choices = row.get("share"), row.get("choices")
    if not (isinstance(share, dict) and isinstance(choices, list) and len(share) == len(choices)):
        return None
    seen = [name for name, count in zip(share, choices, strict=True) if count]
    try:
        shares = np.array([share[name] for name in seen], dtype=np.float64)
    except (ValueError, TypeError):
        return None
    is_whole = shares.ndim == 3 and shares.size and np.isfinite(shares).all()
    return (row["step"], seen, shares) if is_whole else None


def plot_shares(sources: Sequence[str], shares_SLE: Floats, title: str, path: Path) -> None:
    """Heat maps of layers over experts, of all sources together and of each.

    A colour means the same everywhere, also in two pictures: how often an expert is chosen, over
    even use. Sources count alike in the first map.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = use_over_even(sources, shares_SLE)
    num_layers = shares_SLE.shape[1]
    columns = min(len(maps), MOST_COLUMNS)
    rows = -(-len(maps) // columns)
    size = (max(6.0, 2.0 + 2.8 * columns), 1.1 + rows * (0.9 + 0.2 * max(6, num_layers)))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (name, use_LE) in zip(panels.flat, maps, strict=False):
        _heat(axes, use_LE, name)
    for axes in panels.flat[len(maps) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    image = panels[0, 0].images[0]
    bar = figure.colorbar(
        image, ax=panels.ravel().tolist(), extend="max", ticks=[0, 0.5, 1, 1.5, 2]
    )
    bar.set_label("choices of the expert (1: even use)", fontsize=9)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)


def use_over_even(sources: Sequence[str], shares_SLE: Floats) -> list[tuple[str, Floats]]:
    """(title, values [L, E]) of the maps: of several sources their mean first, then each."""
    num_experts = shares_SLE.shape[2]
    maps = [(name, one * num_experts) for name, one in zip(sources, shares_SLE, strict=True)]
    if len(maps) == 1:
        return maps
    return [("all sources", shares_SLE.mean(axis=0) * num_experts), *maps]


def _heat(axes: Axes, use_LE: Floats, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    num_layers, num_experts = use_LE.shape
    extent = (0.5, num_experts + 0.5, num_layers + 0.5, 0.5)
    axes.imshow(
        use_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
