"""What a calibration found: in words, as the content of a report, and as a picture."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascale.arrays import Floats
from megascale.config import RunConfig, dump_config
from megascale.planner.fit import GOOD_ERROR, Fit
from megascale.runtime.distributed import Ranks
from megascale.training.calibrate import Calibration


def summary_lines(done: Calibration, fit: Fit, counts: str) -> list[str]:
    """The coefficients, the errors and everything the user should know of them.

    `counts` says which of the repeats count: median or fastest.
    """
    values = {name: value for name, value in asdict(fit.cost).items() if name != "calibrated"}
    noise = float(np.median([one.noise for one in done.measurements]))
    lines = [
        f"{len(done.measurements)} micro-batches, {counts} of {done.repeats}, in "
        f"{done.seconds:.0f} s" + f"; no time for {done.left_out} more" * bool(done.left_out),
        "  " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()),
        f"  error                 median {_median(fit.errors):.1%}, largest "
        f"{np.abs(fit.errors).max():.1%}",
        f"  error, left out       median {_median(fit.left_out_errors):.1%}, largest "
        f"{np.abs(fit.left_out_errors).max():.1%} (each predicted from the others)",
        f"  noise                 median {noise:.1%} between repeats",
    ]
    if fit.unidentified:
        lines.append(f"  not told by this grid, so 0: {', '.join(fit.unidentified)}")
    if fit.copied:
        lines.append(f"  no ring crossed nodes, so as within a node: {', '.join(fit.copied)}")
    if not fit.is_good:
        lines.append(
            f"warning: the median error is above {GOOD_ERROR:.0%}; calibrate on a machine that "
            "does nothing else, with more --repeats and --minutes, or with --fastest"
        )
    return lines


def report(
    config: RunConfig, ranks: Ranks, done: Calibration, fit: Fit, counts: str
) -> dict[str, Any]:
    """The content of a report, for `json.dumps`: the machine, what was measured and the fit."""
    layout, text = ranks.layout, json.dumps(dump_config(config), sort_keys=True, default=str)
    return {
        "machine": {
            "device": device_name(ranks),
            "threads_per_rank": torch.get_num_threads(),
            "ranks": layout.world,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "hdp": layout.hdp,
        },
        "precision": config.train.precision,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "cost": asdict(fit.cost),
        "median_error": _median(fit.errors),
        "median_left_out_error": _median(fit.left_out_errors),
        "unidentified": fit.unidentified,
        "copied": fit.copied,
        "repeats": done.repeats,
        "seconds": done.seconds,
        "measurements": [
            {
                **asdict(one),
                "measured_s": float(measured),
                "predicted_s": float(predicted),
                "left_out_s": float(left_out),
            }
            for one, measured, predicted, left_out in zip(
                done.measurements, fit.measured_s, fit.predicted_s, fit.left_out_s, strict=True
            )
        ],
        "counts": counts,
    }


def device_name(ranks: Ranks) -> str:
    """The model of the device of this rank."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_name(ranks.device)
    return processor_name()


def processor_name() -> str:
    """The model of this machine's CPU, as Linux tells it; else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def plot_fit(done: Calibration, fit: Fit, path: str) -> None:
    """Draw predicted against measured seconds, a colour for each ring size."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from megascale.monitor.plot_style import COLOURS, MARKERS, STYLE

    sizes = np.array([one.size for one in done.measurements])
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        ends = [fit.measured_s.min() / 1.3 * 1e3, fit.measured_s.max() * 1.3 * 1e3]
        axes.plot(ends, ends, color="#9a9a9a", linewidth=1.0, zorder=1)
        for index, size in enumerate(np.unique(sizes)):
            chosen = sizes == size
            axes.loglog(
                fit.measured_s[chosen] * 1e3,
                fit.predicted_s[chosen] * 1e3,
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                alpha=0.8,
                label=f"ring of {size}",
            )
        axes.set_xlabel("measured, ms")
        axes.set_ylabel("predicted, ms")
        axes.set_title(f"Micro-batches: median error {_median(fit.errors):.1%}")
        axes.legend()
        figure.savefig(path)


def _median(errors: Floats) -> float:
    return float(np.median(np.abs(errors)))
