"""The library: what `import megascale` offers. `help(megascale)` shows it too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from megascale.config import RunConfig
from megascale.errors import UserError
from megascale.installation import require_training
from megascale.planner import CostModel, OffloadModel, Problem, StepPlan, plan_with
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
    chunks: int = 1,
) -> StepPlan:
    """Decide which ranks take which sequences of one batch, and how many share a long one.

    `lengths` are the tokens of each sequence, int[N]. A rank keeps the activations of at most
    `capacity_tokens` in one micro-batch. `mode` says how ranks may differ: "free"; "aligned" for
    `pipeline` stages; "lockstep" for experts over all ranks. `cost` says what a micro-batch takes:
    a model, such as that of `model_cost`, or a COST.json of `megascale calibrate`; None assumes a
    model of 7B. `planner` is "hybrid", a peer such as "static_best", or "module:function".
    `slowdown` has, for each rank, how many times as long as a fast one it takes. With
    pipeline stages "hybrid" may cut the micro-batches of a wave into at most `chunks` chunks.

    The same arguments give equal plans, so each rank may plan for itself; only "flexsp" is an
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

    if cost is None:
        cost = assumed_cost()
    elif not isinstance(cost, CostModel):
        cost = CostModel.load(_path(cost, "cost"))
    if not isinstance(planner, str):
        raise UserError(
            f"planner = {planner!r:.60} must be a name, such as hybrid, or module:function"
        )
    try:
        problem = Problem.of(
            lengths,
            num_ranks,
            capacity_tokens,
            mode,
            cost,
            pipeline=pipeline,
            offload=offload,
            slowdown=slowdown,
            chunks=chunks,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if problem.pipeline > 1 and mode == "free":
        raise UserError(f"pipeline={problem.pipeline} needs mode aligned or lockstep")
    if problem.chunks > 1 and not (problem.may_chunk and planner == "hybrid"):
        raise UserError(f"chunks={problem.chunks} needs pipeline=2 or more, and planner hybrid")
    return replace(plan_with(planner, problem), lengths=tuple(problem.lengths.tolist()))


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

    if not isinstance(tensor, int) or isinstance(tensor, bool) or tensor < 1:
        raise UserError(f"tensor = {tensor!r:.40} must be a whole number of at least 1")
    tree = {"model": dict(model), "data": {"sources": {"none": {"path": "none"}}}}
    config = complete(build_as(RunConfig, tree, where="model_cost"))
    return default_cost(config.model, tensor)


def load_run(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The whole run that a config file describes, with `overrides` such as "train.tokens=20M".

    Its corpora and the checkpoint that it starts from are looked at, and what follows from them is
    filled in. Raises UserError for anything that a user must mend.
    """
    from megascale.run.resolve import load_run as load

    return load(_path(config, "config"), _words(overrides)).config


def _path(value: Any, name: str) -> str | Path:
    if not isinstance(value, (str, Path)):
        raise UserError(f"{name} = {value!r:.60} must be the path of a file or folder")
    return value


def _words(overrides: Any) -> list[str]:
    is_list = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not is_list or not all(isinstance(word, str) for word in overrides):
        raise UserError(
            f'overrides = {overrides!r:.60} must be a list of texts such as ["train.tokens=20M"]'
        )
    return list(overrides)


def train(
    config: str | Path, overrides: Sequence[str] = (), resume: str | int | None = None
) -> bool:
    """Train as `megascale train` does, on the rank that this process is.

    Under torchrun all its ranks call it; else this process is the only one. `resume` is None,
    "auto", "latest" or the number of a step. Signals ask the run to save and stop, if this is the
    main thread. Returns True if one did, and False if the run came to its end. Raises UserError for
    anything that a user must mend.
    """
    from megascale.run.preflight import check_resume
    from megascale.run.resolve import load_run as load
    from megascale.training.entry import train_on_device

    entered = time.time()
    require_training()
    world_from_environment()
    config, overrides = _path(config, "config"), _words(overrides)
    if isinstance(resume, int) and not isinstance(resume, bool):
        resume = str(resume)
    check_resume(resume)
    run = load(config, overrides)
    command = f"megascale.train({str(config)!r}, {overrides!r}, resume='auto')"
    return train_on_device(run, resume, command, entered)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """What a run has measured, a row for each step and evaluation, in the order of writing.

    A row has the numbers of a line of `metrics.jsonl`, as floats. Nested ones have names such as
    `eval/SOURCE/loss`, so `pandas.DataFrame(read_metrics(run))` is a table. Texts, nulls and lines
    that a crash left half-written are left out. Raises UserError if the folder has no metrics.
    """
    from megascale.monitor.metrics import METRICS_FILE, flatten, read_rows

    path = Path(_path(run_dir, "run_dir")) / METRICS_FILE
    try:
        rows = read_rows(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run") from None
    return [dict(flatten(row)) for row in rows]
