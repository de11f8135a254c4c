"""The training loop: the only place that puts side effects in order."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from megascale.checkpoint.folder import checkpoints_dir
from megascale.checkpoint.load import (
    Found,
    find_at,
    find_before,
    restore,
)
from megascale.checkpoint.manifest import Position
from megascale.checkpoint.save import SaveResult
from megascale.config import dump_config, validate
from megascale.corpus.batches import Cursor
from megascale.errors import UserError
from megascale.model.timing import SAMPLED
from megascale.monitor.profile import profiler
from megascale.monitor.step_record import StepResult
from megascale.monitor.stragglers import slowdown_R
from megascale.planner.chunk_order import chunks_of_waves
from megascale.run.earlier_runs import with_earlier
from megascale.run.folder import RunFolder, noting_errors
from megascale.run.growing import require_growth, small_and_grown
from megascale.run.resolve import ResolvedRun
from megascale.run.start import start_of
from megascale.runtime import distributed
from megascale.runtime.distributed import (
    Ranks,
    device_bytes,
    gather_arrays,
)
from megascale.runtime.first_rank import from_first_rank, on_first_rank
from megascale.runtime.heartbeat import begin_pulse, pulse
from megascale.runtime.logs import STARTER_VARIABLE, log_to, say
from megascale.runtime.signals import ECHO_S, TWIN_S, StopRequest
from megascale.training.begin import Run, begin, identities
from megascale.training.capacity import with_own_capacity
from megascale.training.feed import PlannedBatch, start_plans
from megascale.training.grow_checkpoint import write_grown
from megascale.training.sample import sample_text
from megascale.training.step import train_step

COMPARED_STEPS = 10
"""Steps before a comparison of ranks in which they are timed."""
LAST_SAVE_PAUSES_S = (1, 2, 4, 8, 16, 32)
"""Pauses between the tries to save at the end of a run."""


def train(run: ResolvedRun, resume: str | None, command: str, entered: float) -> bool:
    """Train from start or checkpoint to the end; whether a signal stopped it before.

    `resume` is None, 'auto', 'latest' or a step; `command` is what a user types to continue the
    run; `entered` is when it began to make itself ready, in seconds since the epoch. Raises
    UserError for everything that a user can mend.
    """
    config = run.config
    with ExitStack() as leave:
        if config.monitor.heartbeats:
            _begin_heartbeat()
        leave.callback(pulse.enter, "ended")
        ranks = distributed.start(config)
        leave.callback(distributed.stop)
        config = with_own_capacity(config, ranks, resume is not None)
        run = run._replace(config=config)
        stop = StopRequest(echo_s=TWIN_S if STARTER_VARIABLE in os.environ else ECHO_S)
        leave.callback(stop.restore)
        train_one = partial(_train, command=command, ranks=ranks, stop=stop)
        if config.growth is None:
            return train_one(run, resume, entered)
        return _train_growing(run, resume, entered, ranks, train_one)


def _train(
    resolved: ResolvedRun,
    resume: str | None,
    entered: float,
    command: str,
    ranks: Ranks,
    stop: StopRequest,
) -> bool:
    """Train in one run_dir; whether it was stopped before its end.

    `entered` is when the run began to make itself ready.
    """
    pulse.restart()
    config = resolved.config
    with ExitStack() as leave:
        folder = RunFolder.open(config.run_dir, resume, ranks, entered, command)
        leave.callback(folder.close)
        log_to(folder.logs, ranks.rank)
        with folder.noting_errors(ranks):  # before anything is closed
            plans = start_plans(config.planner, ranks, folder.logs)  # it starts beside what follows
            if plans is not None:
                leave.callback(plans.close)
            run = begin(resolved, ranks, folder, plans, resume, stop)
            leave.callback(run.recorder.close)
            leave.callback(run.feed.close)
            _steps(run)
            if not run.stopped and config.eval.sample_prompt is not None:
                _sample(run, config.eval.sample_prompt)
            run.recorder.finished(run.cursor, run.stopped, command)
            return run.stopped


def _train_growing(
    run: ResolvedRun,
    resume: str | None,
    entered: float,
    ranks: Ranks,
    train_one: Callable[[ResolvedRun, str | None, float], bool],
) -> bool:
    """Train the small model, grow it, and train the grown one; each where that is not yet done.

    Whether a signal stopped one of them.
    """
    small, grown, growth = small_and_grown(run.config)
    validate(grown)
    folder = Path(grown.start.checkpoint or "")

    def is_grown() -> bytes:
        return b"1" * (folder.exists() or checkpoints_dir(grown.run_dir).exists())

    if not from_first_rank(ranks, is_grown):
        first = run._replace(config=small)
        if train_one(first, None if resume is None else "auto", entered):
            return True
        pulse.restart()
        with noting_errors(Path(grown.run_dir), ranks):
            found = [find_at(small.run_dir, ranks)]
            waiting = distributed.patient(ranks)  # a piece at a time on one rank, it may take hours
            on_first_rank(waiting, lambda: say(write_grown(found, growth, folder)))
    tokens = small.train.tokens
    on_first_rank(ranks, lambda: require_growth(grown, growth, tokens))
    start = start_of(grown)
    second = run._replace(config=with_earlier(grown, start), start=start)
    return train_one(second, resume, time.time())


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
    ranks, failed = run.learner.ranks, run.recorder.failed
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
            run.recorder.step(run.cursor, planned, result)
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
    with run.recorder.spending("evaluation"):
        scores = {name: held.score(run.learner) for name, held in run.heldout.items()}
    run.recorder.evaluation(run.cursor, scores)


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
    run.recorder.ranks(step, over_R)
    if run.speeds is not None and (first := run.speeds.see(step, over_R)) is not None:
        run.recorder.speeds(step, first, run.speeds.at(first))


def _step(run: Run, planned: PlannedBatch) -> StepResult:
    every = run.config.monitor.compare_ranks_every_steps
    if run.learner.ranks.world > 1 and every and -planned.after.step % every < COMPARED_STEPS:
        run.learner.model.timer.begin_step()
    rings = planned.plan.rings_of(run.reader.hdp_rank)
    return train_step(
        run.learner,
        run.reader.read(planned.plan, planned.batch),
        count=len(rings),
        waves=chunks_of_waves(rings),
        loss_tokens=planned.batch.num_tokens,
        tokens_seen=planned.after.tokens_seen,
        most_loss=run.spikes.most_loss,
        stop=bool(run.stop_request),
        writes_done=run.saver.pending_done(),
        overlap=planned.plan.ends_without_rings,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _guard_loss(run: Run, result: StepResult) -> None:
    """Notice leaps, go back where they persist, and stop where nothing helps."""
    limit, step = run.spikes.limit, run.cursor.step
    leapt = run.spikes.see(result.loss)
    if leapt and math.isfinite(result.loss):
        run.recorder.spike(step, result.loss, limit)
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
    run.recorder.rolled_back(run.cursor.step, run.spikes.in_a_row, found)
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
            "sources": identities(run.sources),
            "cwd": str(Path.cwd()),
            "spikes": run.spikes.to_json(),
            **({"speeds": run.speeds.to_json()} if run.speeds is not None else {}),
        },
    )


def _save(run: Run) -> None:
    pulse.enter("saving")
    run.save_waits = False
    with run.recorder.spending("saving"):
        outcomes = run.saver.save(_position(run), run.learner.model, run.learner.optimizer)
    for outcome in outcomes:
        _saved(run, outcome)


def _copy(run: Run) -> None:
    pulse.enter("saving")
    with run.recorder.spending("saving"):
        copied = run.saver.copy(_position(run), run.learner.model, run.learner.optimizer)
    _saved(run, copied)


def _saved(run: Run, outcome: SaveResult | None) -> None:
    """Record how a save ended; one that failed is tried again after 1, 2, 4, ... steps."""
    run.recorder.saved(outcome)
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
        with run.recorder.spending("saving"):
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
        run.recorder.failed("sample", error)
        return
    if text is not None:
        run.recorder.sample(prompt, text)
