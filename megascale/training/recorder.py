"""What a run says of itself: metrics, events, console lines. Only rank 0 speaks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import wraps
from statistics import fmean
from typing import Any, Concatenate, ParamSpec

from megascale.arrays import Floats
from megascale.checkpoint.load import Found
from megascale.checkpoint.save import SaveResult
from megascale.config import RunConfig, dump_config
from megascale.corpus.batches import Cursor
from megascale.corpus.heldout import HeldoutPart
from megascale.corpus.run_length import RunLength, is_over
from megascale.corpus.sources import SourceInfo
from megascale.installation import versions
from megascale.model.balance import ExpertUse
from megascale.monitor.console import Console
from megascale.monitor.device import peak_flops
from megascale.monitor.experts import CollapseWatch, ExpertLog
from megascale.monitor.metric_fields import for_console, row_of, score_row
from megascale.monitor.metrics import FINISH_S, METRICS_FILE, MetricsWriter, read_rows
from megascale.monitor.step_record import StepRecord, StepResult, bytes_per_token, replayed_share
from megascale.monitor.stragglers import IN_A_ROW, RankLog, StragglerWatch
from megascale.monitor.time_spent import TimeSpent
from megascale.optim.schedule import joints, lr_at
from megascale.run.folder import RunFolder
from megascale.run.heldout_sets import changed, evaluations_of, first_scores, in_words
from megascale.runtime.distributed import Ranks, device_name
from megascale.runtime.logs import say, settle_console
from megascale.training.evaluate import HeldoutScore
from megascale.training.feed import PlannedBatch

HURRIED_S = 5.0
"""What trackers may take to send the last rows where the run did not reach its end."""

P = ParamSpec("P")


def _beside(
    method: Callable[Concatenate[Recorder, P], None],
) -> Callable[Concatenate[Recorder, P], None]:
    """Make an error of a method a warning: a record that fails must not end the run."""

    @wraps(method)
    def guarded(self: Recorder, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.failed(f"recorder ({method.__name__.lstrip('_')})", error)

    return guarded


class Recorder:
    """Writes the run folder's records and talks to the user; on other ranks it does nothing."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        folder: RunFolder,
        sources: Mapping[str, SourceInfo],
        cursor: Cursor,
        length: RunLength,
        nodes: Sequence[str],
        cores_are_shared: bool,
    ) -> None:
        """`length` is counted from `cursor`; `nodes` are the ranks' machines, on rank 0.

        Where `cores_are_shared`, comparisons of ranks go to the files only: which rank is slow
        then depends on what else runs.
        """
        self._config, self._ranks, self._folder = config, ranks, folder
        self._length = length
        self._speaks = ranks.rank == 0
        self._failures: set[str] = set()
        self._finish_s = HURRIED_S
        self._bytes_per_token = bytes_per_token(sources[name] for name in config.data.sources)
        self._device = device_name(ranks.device)
        self._peak = peak_flops(self._device, config.train.precision)
        self._spent = TimeSpent()
        if not self._speaks:
            return
        monitor, resolved = config.monitor, dump_config(config)
        folder.write("config.yaml", resolved)
        self._events = folder.events
        self._note_rewind(cursor.step)
        self._metrics = MetricsWriter(
            folder.path, monitor.tensorboard, monitor.trackers, cursor.step, asdict(config)
        )
        if config.model.moe is not None:
            self._expert_log = ExpertLog(folder.path, cursor.step)
            self._collapse = CollapseWatch(config.model.moe)
        if ranks.world > 1:
            self._rank_log = RankLog(folder.path, cursor.step)
            self._stragglers = StragglerWatch(ranks.world)
        self._nodes, self._cores_are_shared = nodes, cores_are_shared
        self._first_scores: dict[str, float] = {}
        self._console = Console(self._total_steps(cursor), cursor.step)

    def _total_steps(self, cursor: Cursor) -> int:
        """Steps at the end of the run, as it looks at `cursor`."""
        steps, stop = self._length.total_steps(cursor), self._config.train.stop_after_steps
        return steps if stop is None else min(steps, stop)

    def _note_rewind(self, step: int) -> None:
        """Keep account of steps that are about to be trained again."""
        path = self._folder.path / METRICS_FILE
        rows = read_rows(path) if path.exists() else []
        again = [row for row in rows if row["step"] > step and "step_s" in row]
        if again:
            last_step, step_s = again[-1]["step"], fmean(row["step_s"] for row in again)
            written = path.stat().st_mtime
            self._event("rewind", step=step, last_step=last_step, step_s=step_s, written=written)

    @_beside
    def started(self, cursor: Cursor, description: str, notes: Sequence[str]) -> None:
        """Say where the run runs, and from where it goes on; keep its description."""
        self._folder.has_started = True
        if not self._speaks:
            return
        self._folder.write("plan.txt", description)
        for line in description.splitlines():
            if line.startswith("warning: "):
                self._say(line)
        ranks, layout = self._ranks, self._ranks.layout
        self._say(
            f"{ranks.world} rank(s) on {ranks.device.type} over {ranks.backend} ({ranks.why}): "
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x HDP {layout.hdp}, "
            f"expert {layout.expert}, {layout.mode} mode, {self._config.train.precision}"
        )
        self._event(
            "start",
            began=round(self._folder.entered, 3),
            step=cursor.step,
            total_steps=self._total_steps(cursor),
            world=ranks.world,
            layout=asdict(layout),
            precision=self._config.train.precision,
            device=self._device,
            nodes=len(set(self._nodes)),
            versions=versions(),
            command=self._folder.command,
        )
        if cursor.step:
            self._say(f"resumed at step {cursor.step}: {_lr_outlook(self._config, cursor)}")
        for note in notes:
            self._say(note)

    @_beside
    def heldout(self, parts: Mapping[str, HeldoutPart]) -> None:
        """Say how much of the held-out sets is scored, and where that is not what it was before."""
        if not self._speaks:
            return
        evaluations = evaluations_of(self._folder.path)
        self._first_scores = first_scores(evaluations, parts)
        for name, part in parts.items():
            self._say(f"held-out {name}: every evaluation scores {in_words(part)}")
            if (warning := changed(name, part, evaluations)) is not None:
                self._say(f"warning: {warning}")

    @_beside
    def step(self, cursor: Cursor, planned: PlannedBatch, result: StepResult) -> None:
        """Record one step."""
        if not self._speaks:
            return
        record = StepRecord(
            config=self._config,
            cursor=cursor,
            batch=planned.batch,
            plan=planned.plan,
            plan_wait_s=planned.plan_wait_s,
            static_s=planned.static_s,
            result=result,
            world=self._ranks.world,
            peak_flops=self._peak,
            bytes_per_token_S=self._bytes_per_token,
        )
        row = row_of(record)
        self._metrics.write(row)
        if result.experts is not None:
            self._experts(cursor, result.experts)
        self._pass_on_notices()
        self._spent.add("training", result.seconds)
        self._spent.add("planning", planned.plan_wait_s)
        if self._spent.is_due():
            self._event("progress", **self._progress(cursor))
        if planned.trouble is not None:
            self._event("planner", step=cursor.step, problem=planned.trouble)
            self._say(f"warning: step {cursor.step}: {planned.trouble}")
        if result.skipped:
            self._event("skip", step=cursor.step, loss=result.loss, grad_norm=result.grad_norm)
            self._say(f"step {cursor.step} skipped: loss {result.loss}, norm {result.grad_norm}")
        self._console.total_steps = self._total_steps(cursor)
        if self._is_logged(cursor):
            self._say(self._console.line(row | for_console(record)))
        else:
            self._console.take(row)

    def _is_logged(self, cursor: Cursor) -> bool:
        """Whether the step before `cursor` is shown: one of every so many, and the last."""
        every = self._config.monitor.log_every_steps
        return cursor.step % every == 0 or is_over(cursor, self._config.train)

    @_beside
    def _experts(self, cursor: Cursor, use: ExpertUse) -> None:
        """Record which source used which experts, and warn of a collapse."""
        step = cursor.step
        warning = self._collapse.see(use.counts_SLE.sum(dim=0).numpy())
        if warning is not None:
            self._event("routing", step=step, problem=warning)
            self._say(f"warning: step {step}: {warning}")
        if self._is_logged(cursor):
            sources = tuple(self._config.data.sources)
            self._expert_log.write(step, sources, use.counts_SLE.numpy())

    @_beside
    def evaluation(self, cursor: Cursor, scores: Mapping[str, HeldoutScore]) -> None:
        """Record held-out scores."""
        if not self._speaks or not scores:
            return
        self._metrics.write(
            {
                "step": cursor.step,
                "tokens_seen": cursor.tokens_seen,
                "eval": {name: score_row(score) for name, score in scores.items()},
            }
        )
        self._watch_forgetting(cursor.step, scores)
        for name, score in scores.items():
            bits = score.bits_per_byte
            shown = f" {bits:.4f} bits/byte," if bits is not None else ""
            self._say(
                f"held-out {name}: loss {score.loss:.4f},{shown} {score.tokens:,} of "
                f"{score.set_tokens:,} tokens"
            )

    def _watch_forgetting(self, step: int, scores: Mapping[str, HeldoutScore]) -> None:
        """Compare with the first evaluation of the run that scored the same text."""
        alarm = self._config.eval.forgetting_alarm
        for name, score in scores.items():
            rise = score.loss - self._first_scores.setdefault(name, score.loss)
            if alarm is not None and rise > alarm:
                problem = (
                    f"the held-out loss of '{name}' is {rise:.4f} above that at the start "
                    f"(eval.forgetting_alarm = {alarm}); raise data.replay_fraction or lower "
                    "the learning rate"
                )
                self._event("forgetting", step=step, source=name, rise=rise)
                self._say(f"warning: step {step}: {problem}")

    def spending(self, part: str) -> AbstractContextManager[None]:
        """Put the time of a block down to `part`, one of `monitor.time_spent.SPENT`."""
        return self._spent.spending(part)

    def _progress(self, cursor: Cursor) -> dict[str, Any]:
        return {
            "step": cursor.step,
            "tokens_seen": cursor.tokens_seen,
            "spent": self._spent.sums(),
        }

    @_beside
    def ranks(self, step: int, over_R: Floats) -> None:
        """Record how slow the ranks were (`slowdown_R`), and name those that stay slow.

        The user is told where each rank has cores of its own.
        """
        self._rank_log.write(step, over_R)
        for rank in self._stragglers.see(over_R):
            node, over = self._nodes[rank], float(over_R[rank])
            self._event("straggler", step=step, rank=rank, node=node, slowdown=round(over, 3))
            if self._cores_are_shared:
                continue
            self._say(
                f"warning: step {step}: rank {rank} on {node} takes {over:.2f} times as long as "
                f"others for the same work, for {IN_A_ROW} comparisons now"
            )

    @_beside
    def speeds(self, step: int, first: int, slowdown: Sequence[float]) -> None:
        """Say that plans count with other speeds of ranks from step `first` on."""
        slow = {place: one for place, one in enumerate(slowdown) if one > 1}
        self._event("speeds", step=step, first=first, slowdown=list(slowdown))
        counted = [f"rank {place} of the HDP axis as {one:g}" for place, one in slow.items()]
        said = f"{', '.join(counted[:8])} times as slow" if slow else "all ranks as alike"
        self._say(f"step {step}: from step {first} on plans count {said}")

    @_beside
    def spike(self, step: int, loss: float, limit: float) -> None:
        """Say that a loss leapt above what was usual."""
        self._event("spike", step=step, loss=loss, limit=limit)
        self._say(f"warning: step {step}: loss {loss:.4f} leaps above {limit:.4f}")

    @_beside
    def rolled_back(self, step: int, in_a_row: int, found: Found) -> None:
        """Say that the weights are those of an earlier step again."""
        to_step = found.manifest.position.step
        self._event("rollback", step=step, to_step=to_step, in_a_row=in_a_row)
        self._say(
            f"warning: step {step}: {in_a_row} leaps of the loss in a row; weights and optimizer "
            f"are those of step {to_step} again, the data goes on"
        )
        for warning in found.warnings:
            self._say(warning)

    @_beside
    def saved(self, outcome: SaveResult | None) -> None:
        """Record a finished checkpoint, or why there is none."""
        if outcome is None:
            return
        self._event("save", **asdict(outcome))
        if outcome.error is not None:
            self._say(str(outcome))

    @_beside
    def finished(self, cursor: Cursor, stopped: bool, command: str) -> None:
        """Say how the run ended, and how to go on."""
        if self._speaks:
            self._event("stop", **self._progress(cursor), asked=stopped)
        if not stopped:
            self._finish_s = FINISH_S
        if stopped:
            self._say(f"stopped by a signal after step {cursor.step}; go on with:\n  {command}")
        else:
            share = replayed_share(cursor, self._config)
            replayed = f", {share:.2%} of them replayed" if share else ""
            self._say(f"done: {cursor.step} steps, {cursor.tokens_seen:,} tokens{replayed}")

    @_beside
    def sample(self, prompt: str, text: str) -> None:
        """Show what the model writes."""
        self._event("sample", prompt=prompt, text=text)
        self._say(f"sample after {prompt!r}:\n{prompt}{text}")

    def failed(self, what: str, error: Exception) -> None:
        """Report that `what`, something beside the training, failed on this rank.

        The first failure of each is a warning, and its traceback is in the rank's log.
        """
        if what in self._failures:
            return
        self._failures.add(what)
        logging.getLogger("megascale").warning("%s failed", what, exc_info=error)
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._event("failed", what=what, problem=problem)
        self._say(f"warning: {what} failed: {problem}; the run goes on")

    @_beside
    def close(self) -> None:
        """Flush and close the files; trackers get a bounded time to send their last rows."""
        if self._speaks:
            self._metrics.close(self._finish_s)
            self._pass_on_notices()
            if self._ranks.world > 1:
                self._rank_log.close()
            if self._config.model.moe is not None:
                self._expert_log.close()
            settle_console()

    def _pass_on_notices(self) -> None:
        for tracker, text in self._metrics.notices():
            self._event("tracker", tracker=tracker, problem=text)
            self._say(f"warning: {tracker} {text}")

    def _say(self, text: str) -> None:
        if self._speaks:
            say(text)

    def _event(self, kind: str, **fields: Any) -> None:
        if self._speaks:
            self._events.write(kind, **fields)


def _lr_outlook(config: RunConfig, cursor: Cursor) -> str:
    """The learning rate now and at the next joints of its schedule."""
    schedule = config.optim.schedule
    ahead = [(tokens, lr) for tokens, lr in joints(schedule) if tokens > cursor.tokens_seen]
    parts = [f"learning rate {lr_at(cursor.tokens_seen, schedule):.3g} now"]
    parts += [f"{lr:.3g} at {tokens:,} tokens" for tokens, lr in ahead[:3]]
    return ", ".join(parts)
