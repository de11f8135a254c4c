"""The training loop: the only place that puts side effects in order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megascale.checkpoint.folder import checkpoints_dir, name_latest
from megascale.checkpoint.load import begin_from, find, find_at, restore
from megascale.checkpoint.manifest import Position
from megascale.checkpoint.save import Saver
from megascale.config import RunConfig, dump_config, validate
from megascale.corpus.batches import Cursor, GlobalBatches, num_steps
from megascale.corpus.describe import SourceInfo, identity
from megascale.corpus.shards import Shard
from megascale.errors import UserError
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.build import build_model, pack_multiple
from megascale.monitor.profile import profiler
from megascale.optim.build import build_optimizer
from megascale.planner.ahead import PlansAhead
from megascale.resilience.signals import StopRequest
from megascale.runtime import distributed
from megascale.runtime.distributed import Ranks, broadcast_bytes
from megascale.runtime.logs import log_to, note_failure
from megascale.train.describe import describe_run, plan_lengths, step_problem
from megascale.train.evaluate import HeldoutSet, heldout_sets
from megascale.train.feed import Feed, PlannedBatch, start_plans
from megascale.train.folder import RunFolder, on_first_rank
from megascale.train.grow import small_and_grown, write_grown
from megascale.train.report import Report
from megascale.train.resume import compare_configs, compare_sources
from megascale.train.sample import sample_tokens
from megascale.train.start import LINEAGE, Origin, Parent, continued, taken_over
from megascale.train.step import Learner, StepResult, train_step


@dataclass
class Run:
    """A run in progress, on one rank."""

    config: RunConfig
    sources: Mapping[str, SourceInfo]
    learner: Learner
    feed: Feed
    reader: MicroBatchReader
    heldout: Mapping[str, HeldoutSet]
    saver: Saver
    report: Report
    stop_request: StopRequest
    cursor: Cursor
    stopped: bool = False
    """Some rank was asked to stop, and all ranks have."""
    skipped_in_a_row: int = 0

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        whole = num_steps(self.config.data, self.config.train.tokens)
        return min(whole, self.config.train.stop_after_steps or whole)


def train(
    config: RunConfig, sources: Mapping[str, SourceInfo], resume: str | None, command: str
) -> None:
    """Train from start or checkpoint to the end, or until a signal asks to stop.

    `config` is finalized; `resume` is None, 'auto', 'latest' or a step; `command` is what a
    user types to continue the run. Raises UserError for everything that a user can mend.
    """
    with ExitStack() as leave:
        ranks = distributed.start(config)
        leave.callback(distributed.stop)
        stop = StopRequest()
        leave.callback(stop.restore)
        if config.growth is None:
            _train(config, sources, resume, command, ranks, stop)
        else:
            _train_growing(config, sources, resume, command, ranks, stop)


def _train(
    config: RunConfig,
    sources: Mapping[str, SourceInfo],
    resume: str | None,
    command: str,
    ranks: Ranks,
    stop: StopRequest,
) -> bool:
    """Train in one run_dir; whether it was stopped before its end."""
    with ExitStack() as leave:
        folder = RunFolder.open(config.run_dir, resume, ranks)
        leave.callback(folder.close)
        log_to(folder.logs, ranks.rank)
        leave.push(_note_failure)
        plans = start_plans(config.planner, ranks, folder.logs)  # it starts beside what follows
        if plans is not None:
            leave.callback(plans.close)
        run = _begin(config, sources, ranks, folder, plans, resume, stop)
        leave.callback(run.report.close)
        leave.callback(run.feed.close)
        _steps(run)
        if not run.stopped and config.eval.sample_prompt is not None:
            _sample(run, config.eval.sample_prompt)
        run.report.finished(run.cursor, run.stopped, command)
        return run.stopped


def _train_growing(
    config: RunConfig,
    sources: Mapping[str, SourceInfo],
    resume: str | None,
    command: str,
    ranks: Ranks,
    stop: StopRequest,
) -> None:
    """Train the small model, grow it, and train the grown one; each where that is not yet done."""
    small, grown, growth = small_and_grown(config)
    validate(grown)
    folder = Path(grown.start.checkpoint or "")
    if not _on_rank_0(ranks, folder.exists() or checkpoints_dir(grown.run_dir).exists()):
        if _train(small, sources, None if resume is None else "auto", command, ranks, stop):
            return
        on_first_rank(ranks, lambda: print(write_grown([find_at(small.run_dir)], growth, folder)))
    _train(grown, sources, resume, command, ranks, stop)


def _on_rank_0(ranks: Ranks, answer: bool) -> bool:
    """What rank 0 sees, on every rank."""
    return broadcast_bytes(b"1" if answer else b"", ranks) == b"1"


def _note_failure(kind: object, error: BaseException | None, trace: object) -> None:
    if error is not None:
        note_failure(error)


def _steps(run: Run) -> None:
    """Step until the end of the run or a request to stop; save last."""
    config = run.config
    if run.cursor.step == 0 and config.start.checkpoint is not None:
        _evaluate(run)  # what there is to forget
    with profiler(config.monitor, config.run_dir, run.learner.ranks) as profiled_step:
        while run.cursor.step < run.num_steps and not run.stopped:
            planned = run.feed.take(run.cursor, end=run.num_steps)
            result = _step(run, planned)
            run.cursor, run.stopped = planned.after, result.stop
            profiled_step()
            run.report.step(run.cursor, planned, result)
            if run.saver.pending and result.writes_done:
                run.report.saved(run.saver.finalize())
            _guard_skips(run, result)
            ends = run.cursor.step == run.num_steps
            if _due(run.cursor.step, config.eval.every_steps) or (ends and not run.stopped):
                _evaluate(run)
            if ends or run.stopped or _due(run.cursor.step, config.checkpoint.save_every_steps):
                _save(run)
    run.report.saved(run.saver.wait())


def _evaluate(run: Run) -> None:
    scores = {name: held.score(run.learner) for name, held in run.heldout.items()}
    run.report.evaluation(run.cursor, scores)


def _step(run: Run, planned: PlannedBatch) -> StepResult:
    return train_step(
        run.learner,
        run.reader.read(planned.plan, planned.batch),
        count=len(planned.plan.rings_of(run.reader.hdp_rank)),
        loss_tokens=planned.batch.num_tokens,
        tokens_seen=planned.after.tokens_seen,
        stop=bool(run.stop_request),
        writes_done=run.saver.pending_done(),
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _guard_skips(run: Run, result: StepResult) -> None:
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if result.skipped else 0
    limit = run.config.optim.max_skipped_steps
    if run.skipped_in_a_row >= limit:
        raise UserError(
            f"{limit} steps in a row up to step {run.cursor.step} had a non-finite loss or "
            f"gradient norm (loss {result.loss}, norm {result.grad_norm}); lower optim.lr, or "
            "resume an earlier checkpoint with --resume STEP"
        )


def _save(run: Run) -> None:
    position = Position(
        step=run.cursor.step,
        tokens_seen=run.cursor.tokens_seen,
        seed=run.config.seed,
        config=dump_config(run.config),
        cursor={"data": run.cursor.to_json(), "sources": _identity(run.sources)},
    )
    for outcome in run.saver.save(position, run.learner.model, run.learner.optimizer):
        run.report.saved(outcome)


def _identity(sources: Mapping[str, SourceInfo]) -> dict[str, str]:
    return {name: identity(info) for name, info in sources.items()}


def _sample(run: Run, prompt: str) -> None:
    """Show what the model writes after `prompt`, where the corpus brings its tokenizer."""
    from megascale.corpus.tokenizers import load_tokenizer

    info = next(iter(run.sources.values()))
    if info.tokenizer is None:
        return
    tokenizer = load_tokenizer(info.tokenizer)
    begin = [int(token) for token in tokenizer.encode(prompt)]
    drawn = sample_tokens(run.learner, begin, run.config.eval.sample_tokens, info.eod_id)
    run.report.sample(prompt, tokenizer.decode(drawn))


def _begin(
    config: RunConfig,
    sources: Mapping[str, SourceInfo],
    ranks: Ranks,
    folder: RunFolder,
    plans: PlansAhead | None,
    resume: str | None,
    stop: StopRequest,
) -> Run:
    """Build everything a run needs, and put it where its checkpoint left it."""
    model = build_model(config, ranks)
    learner = Learner(config, ranks, model, build_optimizer(config, model))
    cursor, notes = _restore(learner, sources, folder, resume)
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    batches = GlobalBatches(config.data, shards, config.seed)
    problem_of = partial(step_problem, config, ranks.layout)
    readable = [
        TokenSource(name, shards[name], sources[name].eod_id, config.model.vocab_size or 0)
        for name in batches.names
    ]
    saver = Saver(folder.path, config.checkpoint, ranks)
    saver.prepare(model, learner.optimizer)
    report = Report(config, ranks, folder, sources, cursor)
    report.started(cursor, describe_run(config, ranks.layout, sources), notes)
    return Run(
        config=config,
        sources=sources,
        learner=learner,
        feed=Feed(batches, problem_of, ranks, plans, config.planner.ahead_steps),
        reader=MicroBatchReader(
            readable, ranks.hdp_rank, pack_multiple(config), ranks.device, ranks.axis
        ),
        heldout=heldout_sets(learner, sources, partial(plan_lengths, config, ranks.layout)),
        saver=saver,
        report=report,
        stop_request=stop,
        cursor=cursor,
    )


def _restore(
    learner: Learner, sources: Mapping[str, SourceInfo], folder: RunFolder, resume: str | None
) -> tuple[Cursor, list[str]]:
    """Load the checkpoint to continue from; (its cursor, what the user should know)."""
    if resume is None:
        return _start(learner, sources, folder)
    which = resume if resume in ("auto", "latest") else int(resume)
    found = find(folder.path, which, learner.ranks)
    if found is None:
        return _start(learner, sources, folder)
    position = found.manifest.position
    changed = compare_configs(position.config, learner.config)
    compare_sources(position.cursor["sources"], _identity(sources))
    restore(found, learner.model, learner.optimizer, learner.ranks)
    # whoever went back to a step means it: a crash before the next save must not undo that
    checkpoints = checkpoints_dir(folder.path)
    on_first_rank(learner.ranks, lambda: name_latest(checkpoints, position.step))
    notes = [*found.warnings, *(f"changed since the checkpoint: {line}" for line in changed)]
    return Cursor.from_json(position.cursor["data"]), notes


def _start(
    learner: Learner, sources: Mapping[str, SourceInfo], folder: RunFolder
) -> tuple[Cursor, list[str]]:
    """Begin with initial weights, or with those of another run."""
    config = learner.config
    if config.start.checkpoint is None:
        return Cursor(), []
    found = find_at(config.start.checkpoint, learner.ranks)
    keep = config.start.optimizer == "keep"
    begin_from(found, learner.model, learner.optimizer, keep, learner.ranks)
    parent = found.manifest.position
    cursor, notes = continued(parent, config, _identity(sources))
    origin = json.dumps(Origin("start.checkpoint", (Parent.of(found),)).to_json(), indent=1)
    on_first_rank(learner.ranks, lambda: folder.write(LINEAGE, f"{origin}\n"))
    return cursor, [*found.warnings, *taken_over(parent, config), *notes]
