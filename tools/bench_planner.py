"""Plans of ours and of every peer on the same batches, judged by one neutral model.

Every plan is completed to its public JSON and judged by tools/judge.py, which shares no code with
the planner. Shown is its time over the neutral lower bound, in free mode, in lockstep, and in
aligned mode with four pipeline stages (1F1B; there also over the fill bound), and the
time to plan. FlexSP runs by default on the small scenarios only, with 30 s for all
programs it solves. A table of its own has plans with chunks, of 4 and of 8 stages.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import bench_planner_chunks
import numpy as np
from judge import COST_KEYS, judge
from numpy.typing import NDArray
from peers import PEERS, import_megatron_core
from planner_results import (
    MODES,
    NAMES,
    OURS,
    PIPELINE,
    RESULTS,
    Row,
    plot,
    ratio_text,
    read_results,
    results_json,
)

from megascale.planner import (
    PLANNERS,
    CostModel,
    Placed,
    Planner,
    Problem,
    StepPlan,
    complete,
    fill_bound_s,
)
from megascale.simulate.lengths import draw_lengths

LIMIT_S = 120.0
FLEXSP_SOLVER_S = 30.0
FLEXSP_RANKS = 64
KI, MI = 1 << 10, 1 << 20

COST = {
    "a": 5.128e-9,
    "b": 1.84e-4,
    "fixed": 10e-3,
    "latency": 3e-3,
    "transfer_intra": 16e-6,
    "transfer_inter": 50e-6,
    "node_size": 8,
}
"""FlexSP's published fit of a 7B model, with fixed, latency and transfer terms of a 400 Gb/s
cluster."""


@dataclass(frozen=True)
class Scenario:
    """One batch and the cluster it is planned for."""

    lengths: str
    """Name of a distribution, or `corpus`: bytes of the Python standard library's sources."""
    num_ranks: int
    context: int
    capacity: int
    num_sequences: int | None = None
    """All there are, or as many as `num_tokens` asks for, where None."""
    num_tokens: int | None = None

    def draw(self, seed: int) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        if self.lengths == "corpus":
            return corpus_lengths(self.context, self.num_sequences, seed)
        return draw_lengths(
            self.lengths, self.num_tokens, self.context, seed, num_sequences=self.num_sequences
        )

    def describe(self) -> str:
        """One line."""
        tokens, sequences = self.num_tokens, self.num_sequences
        size = f"{tokens // MI}M tokens" if tokens else f"{sequences or 'all'} sequences"
        cut, held = self.context // KI, self.capacity // KI
        return f"{self.lengths}, {self.num_ranks} ranks of {held}K, context {cut}K, {size}"


SCENARIOS = {
    "s1": Scenario("commoncrawl", 64, 32 * KI, 8 * KI, 512),
    "s2": Scenario("github", 64, 128 * KI, 8 * KI, 512),
    "s3": Scenario("commoncrawl", 64, 192 * KI, 6 * KI, 512),
    "s4": Scenario("github", 64, 256 * KI, 8 * KI, 1024),
    "s5": Scenario("github", 256, 128 * KI, 8 * KI, None, 8 * MI),
    "s6": Scenario("github", 256, 256 * KI, 16 * KI, None, 16 * MI),
    "s7": Scenario("commoncrawl", 256, 256 * KI, 8 * KI, 4096),
    "s8": Scenario("github", 1024, 256 * KI, 8 * KI, None, 32 * MI),
    "s9": Scenario("byted", 1024, 2048 * KI, 16 * KI, None, 32 * MI),
    "s10": Scenario("github", 12288, 256 * KI, 8 * KI, None, 32 * MI),
    "s11": Scenario("byted", 12288, 2048 * KI, 16 * KI, None, 32 * MI),
    "s12": Scenario("byted", 12288, 2048 * KI, 8 * KI, None, 256 * MI),
    "o1": Scenario("github", 24, 64 * KI, 8 * KI, 256),
    "o2": Scenario("github", 48, 128 * KI, 8 * KI, 512),
    "o3": Scenario("github", 60, 128 * KI, 8 * KI, 512),
    "o4": Scenario("github", 96, 256 * KI, 8 * KI, 512),
    "c1": Scenario("corpus", 64, 128 * KI, 8 * KI, 512),
    "c2": Scenario("corpus", 256, 1024 * KI, 8 * KI),
}
"""s3 and s7 stand for Wikipedia; commoncrawl is drawn in its place."""
QUICK = ("s1", "s2", "s5", "o3", "c1")

TIMED = {
    "512 sequences on 64 ranks": (SCENARIOS["s2"], 10, 50),
    "4096 sequences on 1024 ranks": (Scenario("github", 1024, 256 * KI, 8 * KI, 4096), 100, 300),
    "32M tokens on 12288 ranks": (SCENARIOS["s10"], 1000, 5000),
}
"""Plan times promised: what, and at most how many milliseconds, without and with a pipeline."""
CHUNKED = "aligned, in chunks"

MODELESS = ("flexsp", "megatron_core")
"""Planners that decide the same in every mode; they run once per scenario."""


def corpus_lengths(context: int, num_sequences: int | None, seed: int) -> NDArray[np.int64]:
    """Bytes of the standard library's *.py files, each cut at `context`; some drawn, or all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages"}
    files = sorted(path for path in root.rglob("*.py") if not foreign & set(path.parts))
    sizes = np.array([path.stat().st_size for path in files], dtype=np.int64)
    lengths = np.minimum(sizes[sizes > 0], context)
    if num_sequences is None:
        return lengths
    return np.random.default_rng(seed).choice(lengths, num_sequences)


@dataclass(frozen=True)
class Job:
    """Some modes of one planner on one scenario, in a process of its own."""

    scenario: str
    planner: str
    modes: tuple[str, ...]


def find_planner(name: str) -> Planner:
    """By its name, among ours and the peers."""
    return PEERS[name] if name in PEERS else PLANNERS[name]


def run_job(job: Job, seed: int, cost: dict[str, float]) -> list[Row]:
    """Plan, and judge what the planner's public JSON says."""
    scenario = SCENARIOS[job.scenario]
    lengths, planner = scenario.draw(seed), find_planner(job.planner)
    rows, decided = [], None
    for mode in job.modes:
        problem = make_problem(scenario, lengths, mode, cost, job.planner)
        if decided is None or job.planner not in MODELESS:
            decided, plan_s = timed(planner, problem)
            plan = decided
        else:
            plan = completed_as(decided, problem)
        verdict = judge(json.loads(json.dumps(plan.to_json())), lengths, cost, PIPELINE)
        ratio = fill = None
        if math.isfinite(step_s := verdict.mode_s(mode)):
            ratio = step_s / verdict.bound_s(mode)
            fill = step_s / fill_bound_s(problem) if mode == "aligned" else None
        problems = "; ".join(verdict.problems)
        rows.append(Row(job.scenario, job.planner, mode, ratio, fill, plan_s, problems))
    return rows


def make_problem(
    scenario: Scenario,
    lengths: NDArray[np.int64],
    mode: str,
    cost: dict[str, float],
    planner: str = OURS,
) -> Problem:
    """What the planner is asked."""
    return Problem.of(
        lengths,
        scenario.num_ranks,
        scenario.capacity,
        mode,  # type: ignore[arg-type]
        CostModel(**cost),  # type: ignore[arg-type]
        pipeline=PIPELINE if mode == "aligned" else 1,
        **({"budget_s": FLEXSP_SOLVER_S} if planner == "flexsp" else {}),
    )


def timed(planner: Planner, problem: Problem, most: int = 3) -> tuple[StepPlan, float]:
    """The plan, and the median time to make it; once only where that takes seconds."""
    seconds: list[float] = []
    while len(seconds) < most and sum(seconds) < 2.0:
        began = time.perf_counter()
        plan = planner(problem)
        seconds.append(time.perf_counter() - began)
    return plan, statistics.median(seconds)


def completed_as(plan: StepPlan, problem: Problem) -> StepPlan:
    """What `plan` decided, completed for the mode of `problem`."""
    placed = [Placed(ring.ranks, ring.sequences) for ring in plan.rings if ring.sequences]
    return complete(problem, placed, time.perf_counter())


def in_process(job: Job, seed: int, cost: dict[str, float], limit_s: float) -> list[Row]:
    """`run_job` in a process of its own, so that a crash or a time-out is a result like others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, job, seed, cost), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(limit_s) else f"no plan in {limit_s:.0f} s"
    except EOFError:
        process.join()
        answer = f"died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if isinstance(answer, str):
        return [Row(job.scenario, job.planner, mode, problem=answer) for mode in job.modes]
    return answer


def _child(sender: Connection, job: Job, seed: int, cost: dict[str, float]) -> None:
    sys.stderr = sys.stdout = open(os.devnull, "w")  # solvers talk
    try:
        sender.send(run_job(job, seed, cost))
    except Exception as error:  # whatever a peer raises is its result
        lines = str(error).splitlines() or [""]
        sender.send(f"{type(error).__name__}: {lines[0]}")


@dataclass
class Progress:
    """One line on the error stream: how far, and how long still."""

    total: int
    done: int = 0
    began: float = field(default_factory=time.perf_counter)

    def show(self, what: str) -> None:
        """Say what runs now."""
        elapsed = time.perf_counter() - self.began
        left = elapsed / self.done * (self.total - self.done) if self.done else None
        eta = "" if left is None else f", about {left:.0f} s left"
        line = f"{self.done}/{self.total} {what}{eta}"
        end = "\r" if sys.stderr.isatty() else "\n"
        if sys.stderr.isatty() or self.done % 10 == 0:
            print(f"\x1b[K{line}" if end == "\r" else line, end=end, file=sys.stderr, flush=True)
        self.done += 1

    def end(self) -> None:
        """Clear the line."""
        if sys.stderr.isatty():
            print("\x1b[K", end="", file=sys.stderr, flush=True)


def make_jobs(scenarios: Sequence[str], planners: Sequence[str], asked: bool) -> list[Job]:
    """All jobs; FlexSP on larger scenarios only where it was `asked` for by name."""
    jobs = []
    for scenario in scenarios:
        for planner in planners:
            small = SCENARIOS[scenario].num_ranks <= FLEXSP_RANKS
            if planner == "flexsp" and not (small or asked):
                continue
            split = [MODES] if planner in MODELESS else [(mode,) for mode in MODES]
            jobs += [Job(scenario, planner, modes) for modes in split]
    return jobs


def plan_times(seed: int, cost: dict[str, float]) -> list[dict[str, object]]:
    """Milliseconds of our planner where a time was promised: median of 5, in every mode."""
    found = []
    for what, (scenario, *goals_ms) in TIMED.items():
        lengths = scenario.draw(seed)
        for mode in (*MODES, CHUNKED):
            problem = make_problem(scenario, lengths, "aligned" if mode == CHUNKED else mode, cost)
            if mode == CHUNKED:
                problem = replace(problem, chunks=bench_planner_chunks.MOST_CHUNKS)
            PLANNERS[OURS](problem)
            median_s = timed(PLANNERS[OURS], problem, most=5)[1]
            goal = goals_ms[mode in ("aligned", CHUNKED)]
            found.append(
                {"what": what, "mode": mode, "ms": round(median_s * 1e3, 1), "goal_ms": goal}
            )
    return found


def table(rows: Sequence[Row], scenarios: Sequence[str], mode: str) -> str:
    """Ratios and plan times of one mode, a planner a line."""
    by_place = {(row.planner, row.scenario): row for row in rows if row.mode == mode}
    planners = list(dict.fromkeys(planner for planner, _ in by_place))
    head = f"{'':<15}" + "".join(f"{name:>8}" for name in scenarios)
    lines = [f"{mode}: time over the lower bound, then time to plan", head]
    for cell in (ratio_text, _time_cell):
        for planner in planners:
            cells = [cell(by_place.get((planner, name))) for name in scenarios]
            lines.append(f"{planner:<15}" + "".join(f"{one:>8}" for one in cells))
        lines.append("")
    return "\n".join(lines)


def _time_cell(row: Row | None) -> str:
    if row is None or row.plan_s is None:
        return "-"
    return f"{row.plan_s:.1f}s" if row.plan_s >= 1 else f"{row.plan_s * 1e3:.0f}ms"


def failures(rows: Sequence[Row]) -> str:
    """What went wrong, each planner and scenario once."""
    seen: dict[str, None] = {}
    for row in rows:
        if row.problem:
            kind = "invalid" if row.ratio is not None else "no plan"
            seen[f"{row.planner} {row.scenario}: {kind}: {row.problem}"] = None
    return "\n".join(seen)


def summary(rows: Sequence[Row]) -> list[str]:
    """Ours against the goals, and against the best valid plan of any peer."""
    lines = []
    for mode, goals in (
        ("free", "median 1.01, worst 1.03"),
        ("lockstep", "worst 1.05"),
        ("aligned", "better than every peer"),
    ):
        in_mode = [row for row in rows if row.mode == mode]
        valid = {(row.planner, row.scenario): row.ratio for row in in_mode if not row.problem}
        ours = {name: ratio for (planner, name), ratio in valid.items() if planner == OURS}
        failed = [row.scenario for row in in_mode if row.planner == OURS and row.problem]
        beaten = [
            f"{name} by {planner}"
            for (planner, name), ratio in valid.items()
            if planner != OURS and ratio < ours.get(name, math.inf) * (1 - 1e-9)
        ]
        if ours:
            worst = max(ours, key=lambda name: ours[name])
            median = statistics.median(ours.values())
            lines.append(
                f"{mode}: {OURS} median {median:.3f}, worst {ours[worst]:.3f} ({worst}) "
                f"(goal: {goals}); beaten on: {', '.join(beaten) or 'none'}"
            )
        if failed:
            lines.append(f"{mode}: {OURS} has no valid plan on {', '.join(failed)}")
    return lines


def chunk_rows(
    scenarios: Sequence[str], seed: int, cost: dict[str, float]
) -> list[bench_planner_chunks.ChunkRow]:
    """Our plans with chunks, of every number of stages."""
    rows = []
    for stages in bench_planner_chunks.STAGES:
        progress = Progress(len(scenarios))
        for name in scenarios:
            progress.show(f"{name} chunks, {stages} stages")
            rows.append(bench_planner_chunks.chunk_row(name, SCENARIOS[name], stages, seed, cost))
        progress.end()
    return rows


def to_json(
    rows: Sequence[Row],
    times: list[dict[str, object]],
    seed: int,
    cost: dict[str, float],
    chunked: Sequence[bench_planner_chunks.ChunkRow] = (),
) -> str:
    """All results as JSON."""
    names = {row.scenario for row in rows}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    head = {"machine": machine, "seed": seed, "cost": cost, "scenarios": about(names)}
    head = {key: value for key, value in head.items() if value}
    head |= {
        "summary": summary(rows),
        "plan_times": times,
        "chunks": bench_planner_chunks.values(chunked),
    }
    return results_json(head, rows)


def about(names: Collection[str]) -> dict[str, str]:
    """What the scenarios of these names are, in the order of all."""
    return {name: one.describe() for name, one in SCENARIOS.items() if name in names}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of `bench.py planner`."""
    parser = argparse.ArgumentParser(prog="bench.py planner", description=__doc__)
    known = [name for name in NAMES if name in PEERS or name in PLANNERS]
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, no FlexSP")
    parser.add_argument("--only", metavar="S1,S2", help=f"of {', '.join(SCENARIOS)}; no plan times")
    parser.add_argument("--planners", metavar="A,B", help=f"of {', '.join(known)}; no plan times")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for one planner, one batch")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn lengths")
    parser.add_argument("--cost", type=Path, help="COST.json instead of FlexSP's 7B fit")
    parser.add_argument("--out", type=Path, help="folder; default: configs/results, if all ran")
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing: draw planner.json of that folder"
    )
    options = parser.parse_args(arguments)
    subset = options.quick or options.only or options.planners
    options.asked = bool(options.planners)
    options.times = not (options.only or options.planners)
    options.scenarios = _chosen(parser, options.only, QUICK if options.quick else SCENARIOS)
    quick = [name for name in known if name != "flexsp"] if options.quick else known
    options.planners = _chosen(parser, options.planners, quick, [*PLANNERS, *PEERS])
    standard = options.seed == 0 and options.cost is None and not subset
    options.out = options.out or (RESULTS if standard or options.redraw else None)
    if options.redraw and not (options.out / "planner.json").is_file():
        parser.error(f"--redraw: there is no planner.json in {options.out}; give --out its folder")
    options.cost = json.loads(options.cost.read_text()) if options.cost else COST
    if set(options.cost) != set(COST_KEYS):
        parser.error(f"--cost must be an object with keys {', '.join(COST_KEYS)}")
    return options


def _chosen(
    parser: argparse.ArgumentParser,
    text: str | None,
    default: Sequence[str] | dict[str, Scenario],
    known: Sequence[str] = tuple(SCENARIOS),
) -> list[str]:
    names = text.split(",") if text else list(default)
    for name in names:
        if name not in known:
            parser.error(f"'{name}' is unknown; choose from {', '.join(known)}")
    return names


def redraw(folder: Path) -> None:
    """Draw `planner.png` from the `planner.json` beside it."""
    batches, rows = read_results(folder / "planner.json")
    plot(rows, batches, folder / "planner.png")
    print(f"written: {folder}/planner.png")


def bench_planner(arguments: Sequence[str]) -> None:
    """Run all jobs, print the tables, and write JSON and picture; or draw the picture alone."""
    options = parse(arguments)
    if options.redraw:
        redraw(options.out)
        return
    if "megatron_core" in options.planners:
        import_megatron_core()
    gc.freeze()  # else collections in children walk and copy all that is imported here
    jobs = make_jobs(options.scenarios, options.planners, options.asked)
    progress, rows = Progress(len(jobs)), []
    for job in jobs:
        progress.show(f"{job.scenario} {job.planner} {' '.join(job.modes)}")
        limit_s = options.limit_s * len(job.modes) if job.planner == "flexsp" else options.limit_s
        rows += in_process(job, options.seed, options.cost, limit_s)
    progress.end()
    for name in options.scenarios:
        print(f"{name:<4} {SCENARIOS[name].describe()}")
    print()
    for mode in MODES:
        print(table(rows, options.scenarios, mode))
    print(failures(rows), *summary(rows), sep="\n")
    chunked: list[bench_planner_chunks.ChunkRow] = []
    if OURS in options.planners:
        chunked = chunk_rows(options.scenarios, options.seed, options.cost)
        print(*bench_planner_chunks.lines(chunked), sep="\n")
    times = plan_times(options.seed, options.cost) if options.times else []
    for one in times:
        print(f"{one['what']}, {one['mode']}: {one['ms']} ms (goal: at most {one['goal_ms']})")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        written = to_json(rows, times, options.seed, options.cost, chunked)
        (options.out / "planner.json").write_text(written, encoding="utf-8")
        plot(rows, about(options.scenarios), options.out / "planner.png")
        print(f"written: {options.out}/planner.json, {options.out}/planner.png")


if __name__ == "__main__":
    bench_planner(sys.argv[1:])
