"""The library: what `import megascale` offers. `help(megascale)` shows it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from megascale.config import RunConfig
from megascale.errors import UserError
from megascale.planner import CostModel, OffloadModel, Problem, StepPlan, find_planner
from megascale.planner.plan import Mode
from megascale.runtime.environment import world_from_environment


def plan(
    lengths: ArrayLike,
    *,
    num_ranks: int,
    capacity_tokens: int,
    mode: Mode = "free",
    cost: CostModel | str | Path | None = None,
    planner: str = "hybrid",
    pipeline: int = 1,
    offload: OffloadModel | None = None,
    slowdown: Sequence[float] = (),
) -> StepPlan:
    """Decide which ranks take which sequences of one batch, and how many share a long one.

    `lengths` are the tokens of each sequence, int[N]. A rank keeps the activations of at most
    `capacity_tokens` in one micro-batch. `mode` says how ranks may differ: "free"; "aligned" for
    `pipeline` stages; "lockstep" for experts over all ranks. `cost` says what a micro-batch takes:
    a model, such as that of `model_cost`, or a COST.json of `megascale calibrate`; None assumes a
    model of 7B. `planner` is "hybrid", a peer such as "static_best", or "module:function".
    `slowdown` has, for each rank, how many times as long as a fast one it takes.

    The same arguments give the same plan, so each rank may plan for itself; only "flexsp" is an
    exception, because its solver has a time limit. Raises UserError (a ValueError) for input from
    which no plan can be made.

    >>> step = plan([900, 300, 200, 200], num_ranks=2, capacity_tokens=512)
    >>> [(batch.sequences, batch.ranks) for batch in step.micro_batches(0)]
    [((0,), (0, 1)), ((1,), (0,))]
    >>> [(batch.sequences, batch.ranks) for batch in step.micro_batches(1)]
    [((0,), (0, 1)), ((2, 3), (1,))]
    >>> next(step.micro_batches(0)).token_ranges
    (((0, 225), (675, 900)),)
    """
    from megascale.simulate.cluster import assumed_cost

    if pipeline > 1 and mode == "free":
        raise UserError(f"pipeline={pipeline} needs mode aligned or lockstep")
    if cost is None:
        cost = assumed_cost()
    elif not isinstance(cost, CostModel):
        cost = CostModel.load(cost)
    try:
        problem = Problem.of(
            lengths,
            num_ranks,
            capacity_tokens,
            mode,
            cost,
            pipeline=pipeline,
            offload=offload,
            slowdown=tuple(slowdown),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    made = find_planner(planner)(problem)
    made.check(problem.lengths.tolist())
    return replace(made, lengths=tuple(problem.lengths.tolist()))


def model_cost(*, tensor: int = 1, **model: Any) -> CostModel:
    """What micro-batches of a model take, from its shape at an assumed speed of the device.

    `model` are options of `model` in a config: `num_layers`, `hidden_size`, `num_heads`,
    `num_kv_heads`, `ffn_hidden_size`, `vocab_size`, ... of one pipeline stage; `tensor` is the
    number of ranks that share its weights. Only ratios of times mean anything; `megascale
    calibrate` measures. Raises UserError for a shape that cannot be.

    >>> small = dict(num_layers=2, hidden_size=64, num_heads=4, vocab_size=1000)
    >>> cost = model_cost(**small)
    >>> cost.ring_s([100], [0]) < cost.ring_s([200], [0])
    True
    """
    from megascale.config.complete import complete
    from megascale.config.load import build_as
    from megascale.model.counts import default_cost

    tree = {"model": dict(model), "data": {"sources": {"none": {"path": "none"}}}}
    config = complete(build_as(RunConfig, tree, where="model_cost"))
    return default_cost(config.model, tensor)


def load_run(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The whole run that a config file describes, with `overrides` such as "train.tokens=20M".

    Its corpora and the checkpoint that it starts from are looked at, and what follows from them is
    filled in. Raises UserError for anything that a user must mend.
    """
    from megascale.run.resolve import load_run as load

    return load(config, overrides).config


def train(config: str | Path, overrides: Sequence[str] = (), resume: str | None = None) -> bool:
    """Train as `megascale train` does, on the rank that this process is; whether it was stopped.

    Under torchrun all its ranks call it; else this process is the only one. `resume` is None,
    "auto", "latest" or the number of a step. Signals ask the run to save and stop. Raises UserError
    for anything that a user must mend.
    """
    from megascale.run.preflight import check_resume
    from megascale.run.resolve import load_run as load
    from megascale.training.entry import train_on_device

    world_from_environment()
    check_resume(resume)
    run = load(config, overrides)
    command = f"megascale.train({str(config)!r}, {list(overrides)!r}, resume='auto')"
    return train_on_device(run, resume, command)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """What a run has measured, a row for each step and evaluation, in the order of writing.

    A row has the numbers of a line of `metrics.jsonl`, as floats. Nested ones have names such as
    `eval/SOURCE/loss`, so `pandas.DataFrame(read_metrics(run))` is a table. Texts, nulls and lines
    that a crash left half-written are left out. Raises UserError if the folder has no metrics.
    """
    from megascale.monitor.metrics import METRICS_FILE, flatten, read_rows

    path = Path(run_dir) / METRICS_FILE
    try:
        rows = read_rows(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run") from None
    return [dict(flatten(row)) for row in rows]
