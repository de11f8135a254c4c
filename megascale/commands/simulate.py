"""`megascale simulate`: many steps at cluster scale on paper, planner beside planner."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TextIO

from megascale.config.load import whole_number
from megascale.devices.table import DEVICES, device_of
from megascale.errors import UserError
from megascale.planner.problem import MOST_RANKS, MOST_TOKENS
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs, write_as_asked
from megascale.simulate.cluster import MODELS, Cluster, layout_of, mode_of, offload_kind, preset_of
from megascale.simulate.lengths import DISTRIBUTIONS
from megascale.simulate.step_lengths import step_lengths
from megascale.simulate.step_time_plot import plot_rows
from megascale.simulate.steps import BASELINE, entrants_of, replay, replay_json
from megascale.simulate.summary import summary_lines, title

RESULTS = json_of("a file of megascale simulate --json", "cluster", "lengths", "planners")
MOST_STEPS = 1000
"""As much as is replayed in minutes."""


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
    budget = "for a planner to improve a plan; without it a fixed number of tries, and equal plans"
    add("--budget-s", type=float, metavar="S", help=budget)
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
    preset = preset_of(args.model)
    tensor = whole_number(args.tensor or str(preset.tensor), "--tensor", 1)
    pipeline = whole_number(args.pipeline or str(preset.pipeline), "--pipeline", 1)
    ranks = whole_number(args.ranks, "--ranks", 1, MOST_RANKS)
    layout = layout_of(
        args.model, ranks, tensor, pipeline, whole_number(args.expert, "--expert", 1)
    )
    if args.budget_s is not None and not 0 <= args.budget_s < float("inf"):
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
        mode=mode_of(args.mode, layout),
        offload=offload_kind(args.offload),
        budget_s=args.budget_s,
    )


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
    entrants = entrants_of(args.planners, cluster.context)
    outputs = [Output("--json", Path(args.json), RESULTS)] if args.json else []
    outputs += [Output("--plot", Path(args.plot), picture())] if args.plot else []
    require_outputs(outputs, [args.lengths.partition(":")[2] or None, args.device])
    batches = step_lengths(args.lengths, cluster.batch_tokens, cluster.context, steps, seed)
    print(title(args.lengths, cluster, batches))
    progress = Progress(len(entrants), steps, sys.stderr)
    problems = [cluster.problem(lengths) for lengths in batches]
    replays = replay(problems, entrants, cluster.overhead_s(), progress)
    progress.clear()
    if not any(one.outcomes for one in replays.values()):
        raise UserError(replays[BASELINE].problem)
    rows = replay_json(replays, BASELINE, cluster.peak_bytes)
    print("\n".join(summary_lines(rows, cluster)))
    if args.json:
        value = {"cluster": cluster.to_json(), "lengths": args.lengths, "seed": seed}
        value["planners"] = rows
        text = json.dumps(value, indent=1) + "\n"
        write_as_asked("--json", args.json, lambda path: write_output(path, text))
    if args.plot:
        above = f"{cluster.model_name} on {cluster.layout.world:,} x {cluster.device_name}, "
        above += f"{args.lengths}, context {cluster.context:,}"
        write_as_asked("--plot", args.plot, lambda path: plot_rows(rows, above, path))
    return 0
