"""Draws the acceptance on a GPU: each row beside its target."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_rows import Row

from megascale.monitor.plot_style import ALARM, COLOURS, EARLIER, STYLE


def bench_gpu(words: Sequence[str]) -> None:
    """Draw the JSON of tools/gpu.sh or tools/gpus.sh."""
    parser = argparse.ArgumentParser(prog="bench.py gpu", description=bench_gpu.__doc__)
    parser.add_argument("json", type=Path, help="what tools/gpu.sh or tools/gpus.sh wrote")
    parser.add_argument("--out", type=Path, help="picture; default: beside the JSON, .png")
    arguments = parser.parse_args(words)
    document = json.loads(arguments.json.read_text())
    rows = [Row(**row) for row in document["rows"]]
    for row in rows:
        print(row)
    out = arguments.out or arguments.json.with_suffix(".png")
    draw(document["machine"], rows, out)
    print(f"wrote {out}")


def of_target(row: Row) -> float | None:
    """How good a value is: 1 at its target, more where it is better; None where that says nothing.

    Rows that are exact (a target of 0, or two bounds) and rows without a value have no bar.
    """
    if not isinstance(row.found, int | float) or (row.least is None) == (row.most is None):
        return None
    if row.least is not None:
        return row.found / row.least if row.least > 0 else None
    return row.most / row.found if row.most and row.found > 0 else None


def draw(machine: dict[str, Any], rows: Sequence[Row], out: Path) -> None:
    """A bar for each row with one bound, to the line of its target; other rows in words."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.3 * len(rows)), layout="constrained")
        for height, row in enumerate(rows):
            ratio, colour = (
                of_target(row),
                {True: COLOURS[2], False: ALARM, None: EARLIER}[row.passed],
            )
            axes.barh(height, min(ratio or 0, MOST), height=0.6, color=colour)
            axes.text(MOST * 1.02, height, in_words(row), va="center", color=colour)
        axes.axvline(1, color="#404040", linewidth=1)
        axes.set(xlim=(0, MOST), ylim=(len(rows) - 0.5, -0.5), xlabel="times its target")
        axes.set_yticks(range(len(rows)), [row.what for row in rows])
        axes.grid(visible=False, axis="y")
        axes.set_title(f"{machine['device']}, torch {machine['torch']}, {machine['commit']}")
        figure.savefig(out)
        pyplot.close(figure)


MOST = 2
"""Longest bar, in times the target."""


def in_words(row: Row) -> str:
    """What was found and its target, as a picture has them."""
    found = f"{row.found:.4g}" if isinstance(row.found, int | float) else str(row.found)
    target = "" if row.target == "-" else f"  (target {row.target})"
    return f"{found} {row.unit}".strip()[:40] + target
