"""`megascale simulate`: many steps at cluster scale on paper, planner beside planner."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from megascale.config import Layout, ModelConfig
from megascale.config.load import whole_number
from megascale.devices.table import DEVICES, GIB, device_of
from megascale.errors import UserError
from megascale.planner import PLANNERS
from megascale.planner.plan import Mode
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs, write_as_asked
from megascale.simulate.cluster import MODELS, Cluster, Offload
from megascale.simulate.lengths import DISTRIBUTIONS, draw_lengths, given_documents, sample_lengths
from megascale.simulate.steps import (
    Entrant,
    plan_static_mesh,
    replay,
    replay_json,
    size_labels,
)

BASELINE = "static"
RESULTS = json_of("a file of megascale simulate --json", "cluster", "lengths", "planners")
MOST_RANKS, MOST_STEPS, MOST_TOKENS = 131_072, 1000, 2**40
"""More than any cluster has, and as much as is replayed in minutes."""
MOST_SEQUENCES = 2**24
"""Of all steps, which are in memory together."""


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale simulate`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--ranks", default="1024", metavar="N", help="devices of the cluster")
    add("--context", default="2048Ki", metavar="TOKENS", help="where longer documents are cut")
    lengths = f"{', '.join(DISTRIBUTIONS)}, or drawn from corpus:FOLDER or file:PATH (one a line)"
    add("--lengths", default="github", metavar="NAME", help=lengths)
    add("--model", default="7b", metavar="NAME", help=", ".join(MODELS))
    add("--batch-tokens", default="32Mi", metavar="TOKENS", help="tokens of a step")
    capacity = "tokens whose activations an HDP rank keeps on its device in one micro-batch"
    add("--capacity", default="8Ki", metavar="TOKENS", help=capacity)
    add("--tensor", metavar="N", help="devices that share each matrix; by the model")
    add("--pipeline", metavar="N", help="pipeline stages; by the model")
    add("--expert", default="1", metavar="N", help="HDP ranks over which experts are spread")
    add("--mode", metavar="MODE", help="free, aligned or lockstep; by pipeline and expert")
    add("--steps", default="5", metavar="N", help="steps to replay")
    add("--planners", metavar="A,B", help=f"beside {BASELINE}; all that can share a sequence")
    add("--budget-s", type=float, default=0.5, metavar="S", help="for a planner to improve a plan")
    offload = "none; paying: as much as saves time; all: as far as copies hide behind compute"
    add("--offload", default="paying", metavar="HOW", help=offload)
    devices = f"{', '.join(DEVICES)}: by its data sheet, or a YAML file of rates"
    add("--device", default="h100", metavar="NAME", help=devices)
    add("--network-gbps", type=float, metavar="G", help="network of a device; by its data sheet")
    add("--seed", default="0", metavar="N", help="of the drawn lengths")
    add("--json", metavar="OUT", help="write everything that is printed to this file")
    add("--plot", metavar="PNG", help="draw where the time goes into this file")


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Check the options of the command line. Raises UserError for the first that cannot be."""
    if args.model not in MODELS:
        raise UserError(f"--model {args.model}: not in the table, which has {', '.join(MODELS)}")
    preset = MODELS[args.model]
    tensor = whole_number(args.tensor or str(preset.tensor), "--tensor", 1)
    pipeline = whole_number(args.pipeline or str(preset.pipeline), "--pipeline", 1)
    layout = _layout(
        preset.model, whole_number(args.ranks, "--ranks", 1, MOST_RANKS), tensor, pipeline, args
    )
    if not 0 <= args.budget_s < float("inf"):
        raise UserError(f"--budget-s {args.budget_s:g}: must be at least 0, such as 0.5")
    return Cluster(
        model_name=args.model,
        model=preset.model,
        layout=layout,
        device_name=args.device,
        device=device_of(args.device, args.network_gbps),
        context=whole_number(args.context, "--context", 1, MOST_TOKENS),
        capacity=whole_number(args.capacity, "--capacity", 1, MOST_TOKENS),
        batch_tokens=whole_number(args.batch_tokens, "--batch-tokens", 1, MOST_TOKENS),
        mode=_mode(args.mode, layout),
        offload=_offload(args.offload),
        budget_s=args.budget_s,
    )


def _layout(
    model: ModelConfig, ranks: int, tensor: int, pipeline: int, args: argparse.Namespace
) -> Layout:
    expert = whole_number(args.expert, "--expert", 1)
    if model.num_heads % tensor or (model.num_kv_heads or 1) % tensor:
        raise UserError(f"--tensor {tensor}: must divide the {model.num_kv_heads} key-value heads")
    if model.num_layers % pipeline:
        raise UserError(f"--pipeline {pipeline}: must divide the {model.num_layers} layers")
    num_experts = model.moe.num_experts if model.moe else 1
    if num_experts % expert:
        raise UserError(f"--expert {expert}: must divide the {num_experts} of --model {args.model}")
    if ranks % (tensor * pipeline * expert):
        least = tensor * pipeline * expert
        raise UserError(
            f"--ranks {ranks}: must be a multiple of tensor {tensor} x pipeline {pipeline} x "
            f"expert {expert} = {least}; try --ranks {max(least, ranks // least * least)}"
        )
    return Layout(ranks, tensor, pipeline, expert, ranks // (tensor * pipeline))


def _mode(name: str | None, layout: Layout) -> Mode:
    modes: dict[str, Mode] = {"free": "free", "aligned": "aligned", "lockstep": "lockstep"}
    if name is None:
        return layout.mode
    if name not in modes:
        raise UserError(f"--mode {name}: must be one of {', '.join(modes)}")
    allowed = list(modes)[list(modes).index(layout.mode) :]
    if name not in allowed:
        raise UserError(
            f"--mode {name}: pipeline {layout.pipeline} and expert {layout.expert} need "
            f"{' or '.join(allowed)}"
        )
    return modes[name]


def _offload(name: str) -> Offload:
    kinds: dict[str, Offload] = {"none": "none", "paying": "paying", "all": "all"}
    if name not in kinds:
        raise UserError(f"--offload {name}: must be one of {', '.join(kinds)}")
    return kinds[name]


def _entrants(text: str | None, context: int) -> list[Entrant]:
    """The baseline, with a mesh for the context, and the planners that `text` names."""
    others = [name for name in PLANNERS if name not in (BASELINE, "longest_first")]
    names = others if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PLANNERS and name != BASELINE:
            raise UserError(f"--planners {name}: unknown; planners are {', '.join(PLANNERS)}")
    chosen = [Entrant(name, PLANNERS[name]) for name in names if name != BASELINE]
    return [Entrant(BASELINE, partial(plan_static_mesh, context=context)), *chosen]


def _batches(spec: str, cluster: Cluster, steps: int, seed: int) -> list[NDArray[np.int64]]:
    """Lengths of each step's sequences."""
    tokens, context = cluster.batch_tokens, cluster.context
    documents = given_documents(spec, "--lengths ")
    draw = partial(draw_lengths, spec) if documents is None else partial(sample_lengths, documents)
    batches: list[NDArray[np.int64]] = []
    for step in range(steps):
        batches.append(draw(tokens, context, seed * 1_000_003 + step))
        if sum(map(len, batches)) > MOST_SEQUENCES:
            raise UserError(
                f"--steps {steps} --batch-tokens {tokens}: more than {MOST_SEQUENCES:,} sequences "
                f"by step {step}; give fewer steps or tokens"
            )
    return batches


class Progress:
    """One line on a terminal that says what runs and how long all of it will take."""

    def __init__(self, entrants: int, steps: int, stream: TextIO) -> None:
        self._total, self._steps, self._stream = entrants * steps, steps, stream
        self._began, self._done = time.monotonic(), 0

    def __call__(self, name: str, step: int) -> None:
        """Say that `step` of planner `name` begins."""
        if self._stream.isatty():
            elapsed_s = time.monotonic() - self._began
            left = elapsed_s / self._done * (self._total - self._done) if self._done else None
            eta = "" if left is None else f", about {left:.0f} s left"
            self._stream.write(f"\r\x1b[K{name}: step {step + 1} of {self._steps}{eta}")
            self._stream.flush()
        self._done += 1

    def clear(self) -> None:
        """Take the line away."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")


def run_simulate(args: argparse.Namespace) -> int:
    """Replay steps and print what each planner makes of them. Raises UserError for bad input."""
    cluster = cluster_of(args)
    steps, seed = (
        whole_number(args.steps, "--steps", 1, MOST_STEPS),
        whole_number(args.seed, "--seed"),
    )
    entrants = _entrants(args.planners, cluster.context)
    outputs = [Output("--json", Path(args.json), RESULTS)] if args.json else []
    outputs += [Output("--plot", Path(args.plot), picture())] if args.plot else []
    require_outputs(outputs, [args.lengths.partition(":")[2] or None, args.device])
    batches = _batches(args.lengths, cluster, steps, seed)
    print(_title(args.lengths, cluster, batches))
    progress = Progress(len(entrants), steps, sys.stderr)
    problems = [cluster.problem(lengths) for lengths in batches]
    replays = replay(problems, entrants, cluster.overhead_s(), progress)
    progress.clear()
    if not any(one.outcomes for one in replays.values()):
        raise UserError(replays[BASELINE].problem)
    rows = replay_json(replays, BASELINE, cluster.peak_bytes)
    print("\n".join([*_table(rows, cluster), *_ring_sizes(rows, cluster), *_notes(cluster)]))
    if args.json:
        value = {"cluster": cluster.to_json(), "lengths": args.lengths, "seed": seed}
        value["planners"] = rows
        text = json.dumps(value, indent=1) + "\n"
        write_as_asked("--json", args.json, lambda path: write_output(path, text))
    if args.plot:
        title = f"{cluster.model_name} on {cluster.layout.world:,} x {cluster.device_name}, "
        title += f"{args.lengths}, context {cluster.context:,}"
        write_as_asked("--plot", args.plot, lambda path: plot_rows(rows, title, path))
    return 0


def _title(lengths: str, cluster: Cluster, batches: Sequence[NDArray[np.int64]]) -> str:
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


def _table(rows: Sequence[dict[str, Any]], cluster: Cluster) -> list[str]:
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


def _ring_sizes(rows: Sequence[dict[str, Any]], cluster: Cluster) -> list[str]:
    labels = size_labels(cluster.layout.hdp)
    lines = ["", f"{'tokens in rings of':<18}" + "".join(f"{label:>11}" for label in labels)]
    for row in rows:
        if "problem" not in row:
            shares = row["tokens_by_ring_size"][: len(labels)]
            lines.append(f"{row['planner']:<18}" + "".join(f"{share:>11.1%}" for share in shares))
    return lines


def _notes(cluster: Cluster) -> list[str]:
    return [
        "",
        "step, x bound: mean time, and over the mean lower bound; idle: waiting for other ranks;",
        "passing: waiting for keys and values; memory: of a device, an estimate, of "
        f"{cluster.device.memory_bytes / GIB:.0f} GiB; plan: time",
        "of the planner on this machine. Rates have assumed efficiencies; they are those of",
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


def plot_rows(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw where each planner's step time goes into `path` (format by its ending)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if "problem" not in row]
    names = [row["planner"] for row in shown]
    step_s = np.array([row["step_s"] for row in shown])
    idle_s = step_s * [row["idle_share"] for row in shown]
    passing_s = step_s * [row["passing_share"] for row in shown]
    figure = Figure(figsize=(9, 1.9 + 0.5 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = np.zeros(len(shown))
    parts = (
        ("computing", step_s - idle_s - passing_s, "#2166ac"),
        ("waiting for keys and values", passing_s, "#e08214"),
        ("waiting for other ranks", idle_s, "#c9c9c9"),
    )
    for label, width, colour in parts:
        axes.barh(names, width, left=left, label=label, color=colour, height=0.62)
        left += width
    for position, row in enumerate(shown):
        text = "" if row["speedup"] is None else f" {row['speedup']:.2f}x"
        axes.text(step_s[position], position, text, va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * step_s.max())
    axes.set_xlabel("seconds per step, mean over ranks")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
