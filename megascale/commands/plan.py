"""`megascale plan`: print the whole derived run without starting it, or plan a list of lengths."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import cast

from megascale.arrays import Integers
from megascale.config import Layout, RunConfig
from megascale.config.load import whole_number
from megascale.corpus.batches import used_sources
from megascale.devices.step_time import step_cost
from megascale.devices.table import DEVICES, device_of
from megascale.errors import UserError
from megascale.monitor.quantities import show_names
from megascale.planner import (
    PLANNERS,
    CostModel,
    Problem,
    StepPlan,
    fill_bound_s,
    plan_with,
    timeline,
)
from megascale.planner.gantt import LEGEND, plot_gantt, text_gantt
from megascale.planner.plan import Mode
from megascale.planner.problem import MOST_CHUNKS, MOST_RANKS, MOST_STAGES, MOST_TOKENS
from megascale.run.auto_capacity import with_capacity_of
from megascale.run.describe import describe_drawn, describe_run, static_line
from megascale.run.on_device import NamedDevice
from megascale.run.step_problem import first_step, plan_first
from megascale.run.without_corpus import load_drawn_run, load_read_run
from megascale.runtime.files import write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs, write_as_asked
from megascale.simulate.cluster import ASSUMED_MODEL, assumed_cost
from megascale.simulate.lengths import DISTRIBUTIONS, read_lengths

PLAN_JSON = json_of("a plan of megascale plan --json", "num_ranks", "capacity", "rings")
LENGTHS_ONLY = ("capacity", "mode", "pp", "chunks", "cost", "planner", "budget_s")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale plan`."""
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="YAML file of the run")
    change = "options that replace those of the file"
    add("overrides", nargs="*", metavar="a.b=c", help=change)
    add("--ranks", metavar="N", help="ranks of the run; default: the fewest that fit")
    devices = f"say memory and time on {', '.join(DEVICES)}, or a YAML file of rates"
    add("--device", metavar="NAME", help=devices)
    drawn = "without its corpora: lengths drawn from "
    drawn += f"{', '.join(DISTRIBUTIONS)}, corpus:FOLDER or FILE (one a line)"
    add("--lengths", metavar="FROM", help=drawn + "; without CONFIG: FILE is one batch")
    counts = "with CONFIG and --lengths: tokens of each source, in place of shards"
    add("--source-tokens", metavar="A=N,B=M", help=counts)
    add("--json", metavar="OUT", help="write the plan (of step 0) to this file")
    add("--gantt", metavar="PNG", help="draw the plan (of step 0) into this file")
    group = parser.add_argument_group("without a config, with --lengths FILE: plan one batch")
    add = group.add_argument
    add("--capacity", metavar="TOKENS", help="tokens that a rank holds in a micro-batch")
    add("--mode", choices=("free", "aligned", "lockstep"), help="default: free")
    add("--pp", metavar="P", help="pipeline stages, in aligned or lockstep mode; default: 1")
    add("--chunks", metavar="K", help="most chunks of a wave, with --pp; default: 1, none")
    add("--cost", metavar="COST.json", help=f"default: that of a {ASSUMED_MODEL} model, assumed")
    names = f"{', '.join(PLANNERS)}, or module:function; default: hybrid"
    add("--planner", metavar="NAME", help=names)
    improve = "seconds to spend on improving the plan; default: a fixed number of tries"
    add("--budget-s", type=float, metavar="S", help=improve)


def run_plan(args: argparse.Namespace) -> int:
    """Print what the run will be; returns the exit status. Raises UserError for bad input."""
    if args.config is None and args.lengths is None:
        raise UserError("plan: give CONFIG, or --lengths FILE --ranks N --capacity TOKENS")
    if args.source_tokens is not None and (args.config is None or args.lengths is None):
        raise UserError("--source-tokens goes with CONFIG and --lengths, in place of corpora")
    if args.config is None:
        _require_outputs(args, args.lengths, args.cost)
        return _run_lengths(args)
    for name in LENGTHS_ONLY:
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(
                f"--{option} goes with --lengths FILE without CONFIG; a config has planner.* itself"
            )
    return _run_config(args)


def _run_config(args: argparse.Namespace) -> int:
    on = None if args.device is None else NamedDevice(args.device, device_of(args.device))
    if args.lengths is None:
        run = load_read_run(args.config, args.overrides)
        layout = _begin(args, run.config)
        run = run._replace(config=_with_capacity(run.config, layout, on))
        first = first_step(run.config, layout, run.sources, _cost(run.config, layout, on))
        text = describe_run(run, layout, first, on)
        corpus = show_names(used_sources(run.config.data.stages))
    else:
        tokens = _source_tokens(args.source_tokens)
        drawn = load_drawn_run(args.config, args.overrides, args.lengths, tokens)
        layout = _begin(args, drawn.config)
        drawn = drawn._replace(config=_with_capacity(drawn.config, layout, on))
        cost = _cost(drawn.config, layout, on)
        first = plan_first(drawn.config, layout, drawn.batch, cost)
        text = describe_drawn(drawn, layout, first, on)
        corpus = show_names([Path(args.lengths).name])
    print(text, end="")
    _write_plan(args, first.problem, first.plan, corpus)
    return 0


def _with_capacity(config: RunConfig, layout: Layout, on: NamedDevice | None) -> RunConfig:
    """With a number where the capacity is `auto`."""
    if on is not None:
        return with_capacity_of(config, layout, *on)
    if config.has_auto_capacity:
        raise UserError(
            "planner.capacity_tokens = auto is what a device holds: give --device "
            f"{', '.join(DEVICES)} or a YAML file, or planner.capacity_tokens=8Ki"
        )
    return config


def _cost(config: RunConfig, layout: Layout, on: NamedDevice | None) -> CostModel | None:
    return None if on is None else step_cost(config, layout, on.device).cost


def _begin(args: argparse.Namespace, config: RunConfig) -> Layout:
    """The layout, after a check of the outputs."""
    _require_outputs(args, args.config, config.planner.cost, args.device, args.lengths)
    return layout_on(config, args.ranks)


def layout_on(config: RunConfig, ranks: str | None) -> Layout:
    """The layout on as many ranks as `--ranks` says; without it, on the fewest that fit.

    Raises UserError.
    """
    cut = config.parallel
    fewest = cut.tensor * cut.pipeline * cut.expert
    number = fewest if ranks is None else whole_number(ranks, "--ranks", 1, MOST_RANKS)
    return Layout.of(config, number)


def _source_tokens(text: str | None) -> dict[str, int]:
    """`a=300G,b=50G` as numbers by name."""
    tokens: dict[str, int] = {}
    for part in [] if text is None else text.split(","):
        name, equals, number = part.strip().partition("=")
        if not name or not equals or name in tokens:
            raise UserError(
                f"--source-tokens {text}: write each source once, as NAME=300G,OTHER=5G"
            )
        tokens[name] = whole_number(number, f"--source-tokens {name}", 1)
    return tokens


def _run_lengths(args: argparse.Namespace) -> int:
    problem = _problem(args)
    plan = plan_with(args.planner or "hybrid", problem)
    times = timeline(plan, problem.lengths, problem.cost)
    sizes = Counter(len(ring.ranks) for ring in plan.rings if ring.sequences)
    shared = sum(count for size, count in sizes.items() if size > 1)
    tokens = int(problem.lengths.sum())
    print(f"{len(problem.lengths):,} sequences of {tokens:,} tokens on {plan.num_ranks:,} ranks")
    print(f"  planned by            {args.planner or 'hybrid'} in {plan.plan_s * 1e3:.1f} ms")
    print(f"  predicted             {plan.predicted_s:.6g} s, {_over(problem, plan)}")
    print(f"  micro-batches         {len(plan.rings):,}, {shared:,} on rings of 2 ranks or more")
    print(f"  imbalance             {times.imbalance:.3f} (time over mean busy time)")
    print(f"  {static_line(problem, plan)}")
    print(f"  {LEGEND}")
    print(
        "\n".join(
            f"  {row}" for row in text_gantt(plan, problem.lengths, problem.cost).splitlines()
        )
    )
    _write_plan(args, problem, plan, show_names([Path(args.lengths).name]))
    return 0


def _over(problem: Problem, plan: StepPlan) -> str:
    """The time over the lower bound, and with pipeline stages over that of work cut at will."""
    if not plan.lower_bound_s:
        return "equal to the lower bound"
    over = f"{plan.predicted_s / plan.lower_bound_s:.3f} x the lower bound"
    if problem.pipeline == 1:
        return over
    return f"{over}, {plan.predicted_s / fill_bound_s(problem):.3f} x the fill bound"


def _problem(args: argparse.Namespace) -> Problem:
    if args.device is not None:
        raise UserError("--device goes with CONFIG; without a config give --cost COST.json")
    for option, value in (("--ranks N", args.ranks), ("--capacity TOKENS", args.capacity)):
        if value is None:
            raise UserError(f"--lengths {args.lengths}: needs {option} too")
    mode, pipeline = args.mode or "free", whole_number(args.pp or "1", "--pp", 1, MOST_STAGES)
    if pipeline > 1 and mode == "free":
        raise UserError(f"--pp {pipeline}: needs --mode aligned, or lockstep")
    chunks = whole_number(args.chunks or "1", "--chunks", 1, MOST_CHUNKS)
    if chunks > 1 and (pipeline == 1 or (args.planner or "hybrid") != "hybrid"):
        raise UserError(f"--chunks {chunks}: needs --pp 2 or more, and --planner hybrid")
    if args.budget_s is not None and not 0 <= args.budget_s < float("inf"):
        raise UserError(f"--budget-s {args.budget_s:g}: must be at least 0, such as 0.5")
    cost = CostModel.load(args.cost) if args.cost else assumed_cost()
    return Problem.of(
        _lengths(args.lengths),
        whole_number(args.ranks, "--ranks", 1, MOST_RANKS),
        whole_number(args.capacity, "--capacity", 1, MOST_TOKENS),
        cast(Mode, mode),
        cost,
        pipeline=pipeline,
        budget_s=args.budget_s,
        chunks=chunks,
    )


def _lengths(path: str) -> Integers:
    if path in DISTRIBUTIONS and not Path(path).exists():
        raise UserError(
            f"--lengths {path}: a name goes with CONFIG; give a file, one length a line"
        )
    return read_lengths(path, "--lengths ")


def _require_outputs(args: argparse.Namespace, *reads: str | None) -> None:
    """Before seconds are spent on a plan that cannot be kept."""
    outputs = [Output("--json", Path(args.json), PLAN_JSON)] if args.json else []
    if args.gantt:
        outputs.append(Output("--gantt", Path(args.gantt), picture(".png")))
    require_outputs(outputs, reads)


def _write_plan(args: argparse.Namespace, problem: Problem, plan: StepPlan, corpus: str) -> None:
    lengths, cost = problem.lengths, problem.cost
    if args.json:
        text = json.dumps(plan.to_json() | {"fill_bound_s": fill_bound_s(problem)}) + "\n"
        write_as_asked("--json", args.json, lambda path: write_output(path, text))
    if args.gantt:
        write_as_asked(
            "--gantt", args.gantt, lambda path: plot_gantt(plan, lengths, cost, path, corpus)
        )
