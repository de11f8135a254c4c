"""`megascale simulate`: many steps at cluster scale on paper, planner beside planner."""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from megascale.arrays import Integers
from megascale.commands.plan import layout_on
from megascale.config.load import whole_number
from megascale.devices.table import DEVICES, device_of
from megascale.errors import UserError
from megascale.planner import PLANNERS
from megascale.planner.problem import MOST_CHUNKS, MOST_RANKS, MOST_TOKENS
from megascale.run.on_device import NamedDevice
from megascale.run.on_paper import on_paper, run_config
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs, write_as_asked
from megascale.simulate.cluster import (
    MODELS,
    Cluster,
    OnPaper,
    layout_of,
    mode_of,
    offload_kind,
    preset_of,
)
from megascale.simulate.lengths import DISTRIBUTIONS
from megascale.simulate.step_lengths import step_lengths
from megascale.simulate.step_time_plot import plot_rows
from megascale.simulate.steps import (
    BASELINE,
    Entrant,
    entrants_of,
    plan_static_mesh,
    replay,
    replay_json,
)
from megascale.simulate.summary import summary_lines, title

RESULTS = json_of("a file of megascale simulate --json", "cluster", "lengths", "planners")
MOST_STEPS = 1000
"""As much as is replayed in minutes."""
WITHOUT_CONFIG = {
    "context": "2048Ki",
    "model": "7b",
    "batch_tokens": "32Mi",
    "capacity": "8Ki",
    "tensor": None,
    "pipeline": None,
    "expert": "1",
    "mode": None,
    "budget_s": None,
    "chunks": "1",
    "offload": "paying",
    "seed": "0",
}
"""Options that a config has itself, with their defaults."""


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale simulate`."""
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="YAML file of a run; else a model by name")
    change = "options that replace those of the file"
    add("overrides", nargs="*", metavar="a.b=c", help=change)
    fewest = "devices of the cluster; default: 1024, or the fewest that fit CONFIG"
    add("--ranks", metavar="N", help=fewest)
    lengths = f"{', '.join(DISTRIBUTIONS)}, or drawn from corpus:FOLDER or FILE (one a line)"
    lengths += "; default: github, or the corpora of CONFIG"
    add("--lengths", metavar="NAME", help=lengths)
    add("--steps", default="5", metavar="N", help="steps to replay; default: 5")
    add("--planners", metavar="A,B", help=f"beside {BASELINE}; default: all that share a sequence")
    devices = f"{', '.join(DEVICES)}: by its data sheet, or a YAML file of rates; default: h100"
    add("--device", default="h100", metavar="NAME", help=devices)
    add("--network-gbps", type=float, metavar="G", help="network of a device; by its data sheet")
    add("--json", metavar="OUT", help="write everything that is printed to this file")
    add("--plot", metavar="PNG", help="draw where the time goes into this file")
    _add_arguments_without_config(parser)


def _add_arguments_without_config(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("without CONFIG, which has these itself").add_argument
    add("--context", metavar="TOKENS", help="where longer documents are cut; default: 2048Ki")
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}; default: 7b")
    add("--batch-tokens", metavar="TOKENS", help="tokens of a step; default: 32Mi")
    capacity = "tokens whose activations an HDP rank keeps on its device in one micro-batch"
    add("--capacity", metavar="TOKENS", help=f"{capacity}; default: 8Ki")
    add("--tensor", metavar="N", help="devices that share each matrix; by the model")
    add("--pipeline", metavar="N", help="pipeline stages; by the model")
    add("--expert", metavar="N", help="HDP ranks over which experts are spread; default: 1")
    add("--mode", metavar="MODE", help="free, aligned or lockstep; by pipeline and expert")
    budget = "for a planner to improve a plan; default: a fixed number of tries, and equal plans"
    add("--budget-s", type=float, metavar="S", help=budget)
    add("--chunks", metavar="K", help="most chunks of a pipeline's wave; default: 1, none")
    offload = "none; paying: as much as saves time; all: as far as copies hide behind compute"
    add("--offload", metavar="HOW", help=f"{offload}; default: paying")
    add("--seed", metavar="N", help="of the drawn lengths; default: 0")


def _cluster(args: argparse.Namespace) -> Cluster:
    preset = preset_of(args.model)
    tensor = whole_number(args.tensor or str(preset.tensor), "--tensor", 1)
    pipeline = whole_number(args.pipeline or str(preset.pipeline), "--pipeline", 1)
    ranks = whole_number(args.ranks or "1024", "--ranks", 1, MOST_RANKS)
    layout = layout_of(
        args.model, ranks, tensor, pipeline, whole_number(args.expert, "--expert", 1)
    )
    chunks = whole_number(args.chunks, "--chunks", 1, MOST_CHUNKS)
    if chunks > 1 and pipeline == 1:
        raise UserError(f"--chunks {chunks}: needs --pipeline 2 or more")
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
        chunks=chunks,
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


class Simulation(NamedTuple):
    """What is replayed."""

    cluster: OnPaper
    lengths: str
    """What the steps are drawn from."""
    seed: int
    batches: list[Integers]
    """Lengths of each step's sequences."""
    entrants: list[Entrant]


def run_simulate(args: argparse.Namespace) -> int:
    """Replay steps and print what each planner makes of them. Raises UserError for bad input."""
    given = _given_without_config if args.config is None else _given_config
    simulation = given(args, whole_number(args.steps, "--steps", 1, MOST_STEPS))
    cluster, lengths, _, batches, entrants = simulation
    print(title(lengths, cluster, batches))
    progress = Progress(len(entrants), len(batches), sys.stderr)
    problems = [cluster.problem(batch) for batch in batches]
    replays = replay(problems, entrants, cluster.cost.reduction_s, progress)
    progress.clear()
    if not any(one.outcomes for one in replays.values()):
        raise UserError(replays[BASELINE].problem)
    rows = replay_json(replays, BASELINE, cluster.peak_bytes)
    print("\n".join(summary_lines(rows, cluster)))
    _write(args, simulation, rows)
    return 0


def _given_without_config(args: argparse.Namespace, steps: int) -> Simulation:
    """A model by name on a cluster that the command line describes."""
    for name, usual in WITHOUT_CONFIG.items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    cluster, lengths = _cluster(args), args.lengths or "github"
    seed = whole_number(args.seed, "--seed")
    static = partial(plan_static_mesh, context=cluster.context)
    entrants = entrants_of(args.planners, static)
    _require_outputs(args)
    batches = step_lengths(lengths, cluster.batch_tokens, cluster.context, steps, seed)
    return Simulation(cluster, lengths, seed, batches, entrants)


def _given_config(args: argparse.Namespace, steps: int) -> Simulation:
    """A run of the user's."""
    for name in WITHOUT_CONFIG:
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} goes without CONFIG, which says it itself")
    _require_outputs(args)
    on = NamedDevice(args.device, device_of(args.device, args.network_gbps))
    config, batches = run_config(args.config, args.overrides, args.lengths, steps)
    cluster = on_paper(args.config, config, layout_on(config, args.ranks), on)
    entrants = entrants_of(args.planners, PLANNERS[BASELINE], config.planner.name)
    lengths = args.lengths or "of the corpora"
    return Simulation(cluster, lengths, config.seed, batches, entrants)


def _require_outputs(args: argparse.Namespace) -> None:
    """Before minutes are spent on what cannot be kept."""
    outputs = [Output("--json", Path(args.json), RESULTS)] if args.json else []
    outputs += [Output("--plot", Path(args.plot), picture())] if args.plot else []
    _, _, path = (args.lengths or "").partition(":")
    require_outputs(outputs, [args.config, path or args.lengths, args.device])


def _write(args: argparse.Namespace, simulation: Simulation, rows: list[dict[str, object]]) -> None:
    cluster, lengths, seed, *_ = simulation
    if args.json:
        value = {"cluster": cluster.to_json(), "lengths": lengths, "seed": seed, "planners": rows}
        text = json.dumps(value, indent=1) + "\n"
        write_as_asked("--json", args.json, lambda path: write_output(path, text))
    if args.plot:
        above = f"{cluster.model_name} on {cluster.layout.world:,} x {cluster.device_name}, "
        above += f"{lengths}, context {cluster.context:,}"
        write_as_asked("--plot", args.plot, lambda path: plot_rows(rows, above, path))
