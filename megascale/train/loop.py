"""The training loop: the only place that puts side effects in order."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from megascale.checkpoint.emergency import Emergency
from megascale.checkpoint.folder import checkpoints_dir, go_on_from
from megascale.checkpoint.load import (
    Found,
    begin_from,
    find,
    find_at,
    find_before,
    newest_step,
    restore,
)
from megascale.checkpoint.manifest import Position
from megascale.checkpoint.save import Saver, SaveResult
from megascale.config import RunConfig, dump_config, parse_config, validate
from megascale.corpus.batches import Cursor, GlobalBatches, with_stages
from megascale.corpus.run_length import is_over, run_length
from megascale.corpus.shards import Shard
from megascale.corpus.sources import SourceInfo, identity
from megascale.errors import UserError
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.build import build_model, pack_multiple
from megascale.model.timing import SAMPLED
from megascale.monitor.profile import profiler
from megascale.monitor.speeds import RankSpeeds
from megascale.monitor.stragglers import slowdown_R
from megascale.optim.build import build_optimizer
from megascale.planner.service.ahead import PlansAhead
from megascale.run.describe import describe_run, plan_lengths, step_problem
from megascale.run.earlier_runs import places_told, with_earlier
from megascale.run.folder import RunFolder, noting_errors
from megascale.run.growing import require_growth, small_and_grown
from megascale.run.resume import compare_configs, compare_sources, softmax_changes
from megascale.run.start import (
    LINEAGE,
    Origin,
    Parent,
    find_start,
    keep_of_import,
    taken_over,
)
from megascale.runtime import distributed
from megascale.runtime.distributed import (
    Ranks,
    cores_are_shared,
    device_bytes,
    gather_arrays,
    node_names,
)
from megascale.runtime.first_rank import from_first_rank, on_first_rank
from megascale.runtime.heartbeat import begin_pulse, pulse
from megascale.runtime.logs import STARTER_VARIABLE, log_to, say
from megascale.runtime.signals import ECHO_S, TWIN_S, StopRequest
from megascale.train.evaluate import HeldoutSet, heldout_sets
from megascale.train.feed import Feed, PlannedBatch, start_plans
from megascale.train.grow_checkpoint import write_grown
from megascale.train.recorder import Report
from megascale.train.sample import sample_text
from megascale.train.spikes import SpikeWatch
from megascale.train.step import Learner, StepResult, train_step

COMPARED_STEPS = 10
"""Steps before a comparison of ranks in which they are timed."""
LAST_SAVE_PAUSES_S = (1, 2, 4, 8, 16, 32)
"""Pauses between the tries to save at the end of a run."""


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
    spikes: SpikeWatch
    speeds: RankSpeeds | None = None
    """On rank 0, where plans are to count with them."""
    stopped: bool = False
    """Some rank was asked to stop, and all ranks have."""
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    """In a row."""
    save_again_at: int | None = None
    """Step after which a failed save is tried again."""
    save_waits: bool = False
    """A checkpoint is due, and is written once the loss is settled."""

    @property
    def is_over(self) -> bool:
        """Whether its last step is done."""
        return is_over(self.cursor, self.config.train)


def train(
    config: RunConfig, sources: Mapping[str, SourceInfo], resume: str | None, command: str
) -> bool:
    """Train from start or checkpoint to the end; whether a signal stopped it before.

    `config` is finalized; `resume` is None, 'auto', 'latest' or a step; `command` is what a
    user types to continue the run. Raises UserError for everything that a user can mend.
    """
    with ExitStack() as leave:
        if config.monitor.heartbeats:
            _begin_heartbeat()
        leave.callback(pulse.enter, "ended")
        ranks = distributed.start(config)
        leave.callback(distributed.stop)
        stop = StopRequest(echo_s=TWIN_S if STARTER_VARIABLE in os.environ else ECHO_S)
        leave.callback(stop.restore)
        run = partial(_train, sources=sources, command=command, ranks=ranks, stop=stop)
        if config.growth is None:
            return run(config, resume, psutil.Process().create_time())
        return _train_growing(config, resume, ranks, run)


def _train(
    config: RunConfig,
    resume: str | None,
    entered: float,
    sources: Mapping[str, SourceInfo],
    command: str,
    ranks: Ranks,
    stop: StopRequest,
) -> bool:
    """Train in one run_dir; whether it was stopped before its end.

    `entered` is when the run began to make itself ready.
    """
    pulse.restart()
    with ExitStack() as leave:
        folder = RunFolder.open(config.run_dir, resume, ranks, entered, command)
        leave.callback(folder.close)
        log_to(folder.logs, ranks.rank)
        with folder.noting_errors(ranks):  # before anything is closed
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
    resume: str | None,
    ranks: Ranks,
    run: Callable[[RunConfig, str | None, float], bool],
) -> bool:
    """Train the small model, grow it, and train the grown one; each where that is not yet done.

    Whether a signal stopped one of them.
    """
    small, grown, growth = small_and_grown(config)
    validate(grown)
    folder = Path(grown.start.checkpoint or "")

    def is_grown() -> bytes:
        return b"1" * (folder.exists() or checkpoints_dir(grown.run_dir).exists())

    if not from_first_rank(ranks, is_grown):
        if run(small, None if resume is None else "auto", psutil.Process().create_time()):
            return True
        pulse.restart()
        with noting_errors(Path(grown.run_dir), ranks):
            found = [find_at(small.run_dir, ranks)]
            waiting = distributed.patient(ranks)  # a piece at a time on one rank, it may take hours
            on_first_rank(waiting, lambda: say(write_grown(found, growth, folder)))
    tokens = small.train.tokens
    on_first_rank(ranks, lambda: require_growth(grown, growth, tokens))
    return run(with_earlier(grown), resume, time.time())


def _begin_heartbeat() -> None:
    """A rank whose heartbeat cannot be had trains without it; its launcher sees no hang of it."""
    try:
        begin_pulse()
    except (OSError, ValueError, RuntimeError) as error:
        say(f"warning: no heartbeat of this rank: {error}; the run goes on")


def _steps(run: Run) -> None:
    """Step until the end of the run or a request to stop; save last."""
    config = run.config
    pulse.begin_at(run.cursor.step)
    if run.cursor.step == 0 and config.start.checkpoint is not None:
        _evaluate(run)  # what there is to forget
    ranks, failed = run.learner.ranks, run.report.failed
    with profiler(config.monitor, config.run_dir, ranks, failed) as profiled_step:
        while not run.is_over and not run.stopped:
            pulse.enter("planning")
            planned = run.feed.take(run.cursor)
            if run.cursor.step and planned.after.stage != run.cursor.stage:
                run.spikes.begin_anew()  # another blend has other losses
            result = _step(run, planned)
            run.cursor, run.stopped = planned.after, result.stop
            pulse.step(run.cursor.step, device_bytes(ranks.device))
            pulse.enter("profiling")
            profiled_step()
            pulse.enter("reporting")
            run.report.step(run.cursor, planned, result)
            if run.saver.pending and result.writes_done:
                _saved(run, run.saver.finalize())
            _compare_ranks(run)
            _guard_loss(run, result)
            ends = run.is_over
            if _due(run.cursor.step, config.eval.every_steps) or (ends and not run.stopped):
                _evaluate(run)
            due = _due(run.cursor.step, config.checkpoint.save_every_steps)
            run.save_waits |= due or run.cursor.step == run.save_again_at
            settled = run.save_waits and run.spikes.is_settled(run.cursor.step)
            if ends or run.stopped or settled:
                _save(run)
            elif _due(run.cursor.step, config.checkpoint.emergency_every_steps):
                _copy(run)
    _finish_save(run)
    if run.saver.emergency is not None:
        run.saver.emergency.forget_after(-1)  # the checkpoint is as new


def _evaluate(run: Run) -> None:
    pulse.enter("evaluation")
    with run.report.spending("evaluation"):
        scores = {name: held.score(run.learner) for name, held in run.heldout.items()}
    run.report.evaluation(run.cursor, scores)


def _compare_ranks(run: Run) -> None:
    """Every so many steps: let rank 0 know how fast all ranks computed."""
    every, ranks = run.config.monitor.compare_ranks_every_steps, run.learner.ranks
    if ranks.world == 1 or not _due(run.cursor.step, every):
        return
    timed = run.learner.model.timer.take()
    room = np.full((COMPARED_STEPS * SAMPLED, 3), np.nan)
    room[: len(timed)] = timed[: len(room)]
    everybody = gather_arrays(room, ranks)
    if everybody is None:
        return
    step, over_R = run.cursor.step, slowdown_R(everybody)
    run.report.ranks(step, over_R)
    if run.speeds is not None and (first := run.speeds.see(step, over_R)) is not None:
        run.report.speeds(step, first, run.speeds.at(first))


def _step(run: Run, planned: PlannedBatch) -> StepResult:
    every = run.config.monitor.compare_ranks_every_steps
    if run.learner.ranks.world > 1 and every and -planned.after.step % every < COMPARED_STEPS:
        run.learner.model.timer.begin_step()
    return train_step(
        run.learner,
        run.reader.read(planned.plan, planned.batch),
        count=len(planned.plan.rings_of(run.reader.hdp_rank)),
        loss_tokens=planned.batch.num_tokens,
        tokens_seen=planned.after.tokens_seen,
        most_loss=run.spikes.most_loss,
        stop=bool(run.stop_request),
        writes_done=run.saver.pending_done(),
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _guard_loss(run: Run, result: StepResult) -> None:
    """Notice leaps, go back where they persist, and stop where nothing helps."""
    limit, step = run.spikes.limit, run.cursor.step
    leapt = run.spikes.see(result.loss)
    if leapt and math.isfinite(result.loss):
        run.report.spike(step, result.loss, limit)
    if leapt and run.spikes.persists:
        if run.config.train.spikes.action == "rollback":
            _roll_back(run)
            return
        run.spikes.begin_anew()
    broken = result.skipped and not (leapt and math.isfinite(result.loss))
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if broken else 0
    _guard_skips(run, result)


def _roll_back(run: Run) -> None:
    """Restore a checkpoint from before the leaps, and go on with the data that comes next."""
    pulse.enter("restoring")
    _saved(run, run.saver.wait())
    found = _found_before_spikes(run)
    position = found.manifest.position
    restore(found, run.learner.model, run.learner.optimizer, run.learner.ranks)
    if run.saver.emergency is not None:
        run.saver.emergency.forget_after(position.step)
    run.report.rolled_back(run.cursor.step, run.spikes.in_a_row, found)
    same_stage = Cursor.from_json(position.cursor["data"]).stage == run.cursor.stage
    usual = position.cursor["spikes"] if same_stage else None
    run.spikes.roll_back(usual, to=position.step, at=run.cursor.step)
    run.skipped_in_a_row = 0


def _found_before_spikes(run: Run) -> Found:
    """The newest checkpoint before the spikes; an earlier one where it has not helped before.

    Raises UserError where there is none.
    """
    spikes, ranks, run_dir = run.spikes, run.learner.ranks, run.config.run_dir
    try:
        found = find_before(run_dir, run.cursor.step - spikes.in_a_row, ranks)
        if spikes.rolled_to is not None and found.manifest.position.step <= (spikes.rolled_at or 0):
            found = find_before(run_dir, spikes.rolled_to - 1, ranks)
        return found
    except UserError as error:
        tried = f", also after going back to step {spikes.rolled_to}," * bool(spikes.rolled_to)
        raise UserError(
            f"the loss stays too high{tried} for {spikes.in_a_row} steps up to step "
            f"{run.cursor.step} and cannot go back: {error}; lower optim.lr and resume an earlier "
            "checkpoint with --resume STEP"
        ) from None


def _guard_skips(run: Run, result: StepResult) -> None:
    limit = run.config.optim.max_skipped_steps
    if run.skipped_in_a_row >= limit:
        raise UserError(
            f"{limit} steps in a row up to step {run.cursor.step} had a non-finite loss or "
            f"gradient norm (loss {result.loss}, norm {result.grad_norm}); lower optim.lr, or "
            "resume an earlier checkpoint with --resume STEP"
        )


def _position(run: Run) -> Position:
    return Position(
        step=run.cursor.step,
        tokens_seen=run.cursor.tokens_seen,
        seed=run.config.seed,
        config=dump_config(run.config),
        cursor={
            "data": run.cursor.to_json(),
            "sources": _identity(run.sources),
            "cwd": str(Path.cwd()),
            "spikes": run.spikes.to_json(),
            **({"speeds": run.speeds.to_json()} if run.speeds is not None else {}),
        },
    )


def _save(run: Run) -> None:
    pulse.enter("saving")
    run.save_waits = False
    with run.report.spending("saving"):
        outcomes = run.saver.save(_position(run), run.learner.model, run.learner.optimizer)
    for outcome in outcomes:
        _saved(run, outcome)


def _copy(run: Run) -> None:
    pulse.enter("saving")
    with run.report.spending("saving"):
        copied = run.saver.copy(_position(run), run.learner.model, run.learner.optimizer)
    _saved(run, copied)


def _saved(run: Run, outcome: SaveResult | None) -> None:
    """Record how a save ended; one that failed is tried again after 1, 2, 4, ... steps."""
    run.report.saved(outcome)
    if outcome is None or outcome.emergency:
        return
    run.failed_saves = run.failed_saves + 1 if outcome.error is not None else 0
    run.save_again_at = run.cursor.step + 2 ** (run.failed_saves - 1) if run.failed_saves else None


def _finish_save(run: Run) -> None:
    """Wait for the last save; one that fails is tried again after 1, 2, 4, ... seconds.

    Raises UserError where it keeps failing.
    """
    pulse.enter("saving")
    for pause_s in (*LAST_SAVE_PAUSES_S, None):
        with run.report.spending("saving"):
            outcome = run.saver.wait()
        _saved(run, outcome)
        if not run.failed_saves:
            return
        if pause_s is not None:
            time.sleep(pause_s)
            _save(run)
    raise UserError(
        f"no checkpoint could be written at the end of the run, after step {run.cursor.step}: "
        f"{outcome.error if outcome else 'see the warnings'}; make room or access, and run again "
        "with --resume auto"
    )


def _identity(sources: Mapping[str, SourceInfo]) -> dict[str, str]:
    return {name: identity(info) for name, info in sources.items()}


def _sample(run: Run, prompt: str) -> None:
    """Show what the model writes after `prompt`, where the corpus brings its tokenizer.

    The run is saved by then, so an error is a warning.
    """
    info = next(iter(run.sources.values()))
    if info.tokenizer is None:
        return
    count, stop = run.config.eval.sample_tokens, run.stop_request.__bool__
    try:
        text = sample_text(run.learner, prompt, info, count, stop)
    except Exception as error:
        run.report.failed("sample", error)
        return
    if text is not None:
        run.report.sample(prompt, text)


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
    spikes, speeds = SpikeWatch(config.train.spikes), _rank_speeds(config, ranks)
    saver = Saver(
        folder.path, config.checkpoint, ranks, _emergency(folder.path, config, ranks, resume)
    )
    cursor, notes = _restore(learner, sources, folder, resume, spikes, speeds, saver.emergency)
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    batches = GlobalBatches(config.data, shards, config.seed)
    feed = Feed(
        batches,
        partial(step_problem, config, ranks.layout),
        ranks,
        plans,
        config.planner.ahead_steps,
        partial(is_over, train=config.train),
        *([speeds.at] if speeds is not None else []),
    )
    readable = [
        TokenSource(name, shards[name], sources[name].first_id, config.model.vocab_size or 0)
        for name in batches.names
    ]
    saver.prepare(model, learner.optimizer)
    length = run_length(batches, config.train.tokens, cursor)
    nodes, shared = node_names(ranks), cores_are_shared(ranks)
    make_report = partial(Report, config, ranks, folder, sources, cursor, length, nodes, shared)
    report = on_first_rank(ranks, make_report) or make_report()  # it writes on rank 0 only
    description = on_first_rank(ranks, lambda: describe_run(config, ranks.layout, sources))
    report.started(cursor, description or "", notes)
    heldout = heldout_sets(learner, sources, partial(plan_lengths, config, ranks.layout))
    report.heldout({name: one.part for name, one in heldout.items()})
    return Run(
        config=config,
        sources=sources,
        learner=learner,
        feed=feed,
        reader=MicroBatchReader(
            readable, ranks.hdp_rank, pack_multiple(config), ranks.device, ranks.axis
        ),
        heldout=heldout,
        saver=saver,
        report=report,
        stop_request=stop,
        cursor=cursor,
        spikes=spikes,
        speeds=speeds,
    )


def _emergency(
    run_dir: Path, config: RunConfig, ranks: Ranks, resume: str | None
) -> Emergency | None:
    directory = config.checkpoint.emergency_dir
    if directory is None:
        return None
    on_first_rank(ranks, lambda: checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True))
    return Emergency(run_dir, directory, ranks, anew=resume not in ("auto", "latest"))


def _rank_speeds(config: RunConfig, ranks: Ranks) -> RankSpeeds | None:
    """What plans count with, where they are to; on rank 0, which alone has them made."""
    if config.planner.rank_speeds == "equal":
        return None
    places = gather_arrays(np.array([ranks.hdp_rank]), ranks)
    return None if places is None else RankSpeeds(places[:, 0], config.planner.ahead_steps)


def _restore(
    learner: Learner,
    sources: Mapping[str, SourceInfo],
    folder: RunFolder,
    resume: str | None,
    spikes: SpikeWatch,
    speeds: RankSpeeds | None,
    emergency: Emergency | None,
) -> tuple[Cursor, list[str]]:
    """Load the checkpoint to continue from; (its cursor, what the user should know)."""
    if resume is None:
        return _start(learner, sources, folder)
    found, warnings = _find(folder.path, resume, learner.ranks, emergency)
    if emergency is not None:
        emergency.forget_after(-1 if found is None else found.manifest.position.step)
    if found is None:
        return _start(learner, sources, folder)
    position = found.manifest.position
    cursor = Cursor.from_json(position.cursor["data"])
    changed = compare_configs(position.config, learner.config, position.tokens_seen)
    was = parse_config(position.config).data.stages
    cursor, left = with_stages(cursor, was, learner.config.data.stages), cursor
    compare_sources(position.cursor["sources"], _identity(sources))
    restore(found, learner.model, learner.optimizer, learner.ranks)
    spikes.go_on(position.cursor["spikes"])
    if cursor is not left:
        spikes.begin_anew()  # another blend has other losses
    if speeds is not None and not speeds.go_on(position.cursor.get("speeds")):
        changed = [*changed, "number of ranks, whose speeds are measured anew"]
    # whoever went back to a step means it: a crash before the next save must not undo that
    checkpoints = checkpoints_dir(folder.path)
    if found.bring is None:
        on_first_rank(learner.ranks, lambda: go_on_from(checkpoints, position.step))
    notes = [*warnings, *(f"changed since the checkpoint: {line}" for line in changed)]
    notes += [*softmax_changes(found, learner.config), *_end_reached(cursor, learner.config)]
    return cursor, notes


def _end_reached(cursor: Cursor, config: RunConfig) -> Iterator[str]:
    """That a run is over which may have been meant to go on."""
    if cursor.tokens_seen >= config.train.tokens:
        yield (
            f"nothing is left to train: the checkpoint of step {cursor.step} has seen "
            f"{cursor.tokens_seen:,} tokens, and train.tokens = {config.train.tokens:,}"
        )


def _find(
    run_dir: Path, resume: str, ranks: Ranks, emergency: Emergency | None
) -> tuple[Found | None, list[str]]:
    """The checkpoint to continue from, or the emergency copy that is newer; what is wrong."""
    warnings: list[str] = []
    if emergency is not None and resume in ("auto", "latest"):
        found, warnings = emergency.find(newest_step(run_dir, ranks))
        if found is not None:
            step = found.manifest.position.step
            return found, [*warnings, f"goes on from the emergency copy of step {step}"]
    found = find(run_dir, resume if resume in ("auto", "latest") else int(resume), ranks)
    return found, [*warnings, *(found.warnings if found is not None else ())]


def _start(
    learner: Learner, sources: Mapping[str, SourceInfo], folder: RunFolder
) -> tuple[Cursor, list[str]]:
    """Begin with initial weights, or with those of another run."""
    config = learner.config
    if config.start.checkpoint is None:
        return Cursor(), []
    found = find_start(config.start.checkpoint, learner.ranks)
    keep = config.start.optimizer == "keep"
    begin_from(found, learner.model, learner.optimizer, keep, learner.ranks)
    parent = found.manifest.position
    origin = json.dumps(Origin("start.checkpoint", (Parent.of(found),)).to_json(), indent=1)
    on_first_rank(learner.ranks, lambda: folder.write(LINEAGE, f"{origin}\n"))
    on_first_rank(learner.ranks, lambda: keep_of_import(found, folder.path))
    notes = [*taken_over(parent, config), *places_told(config), *softmax_changes(found, config)]
    return Cursor(), notes
