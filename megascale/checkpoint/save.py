"""Saving in two stages: copy to host memory before the next update, write beside training."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megascale.checkpoint import folder as folders
from megascale.checkpoint.boxes import Box, boxes
from megascale.checkpoint.emergency import Emergency
from megascale.checkpoint.host_copy import HostCopy
from megascale.checkpoint.manifest import FileSum, Manifest, Position, current_versions
from megascale.checkpoint.storage import (
    Entry,
    Written,
    check_cover,
    one_line,
    write_index,
    write_tensors,
)
from megascale.config import CheckpointConfig
from megascale.model.model import Model
from megascale.optim.build import Optimizer
from megascale.runtime.distributed import Ranks, broadcast_bytes
from megascale.runtime.files import UNFINISHED, discard, sync_folder
from megascale.runtime.first_rank import from_first_rank, on_first_rank

T = TypeVar("T")
REPORT_BYTES = 2048
REPORT_BYTES_PER_BOX = 48  # two whole numbers of 64 bits, as text


@dataclass(frozen=True)
class SaveResult:
    """How one save ended; the same on every rank."""

    step: int
    bytes: int
    """Size of the checkpoint; 0 when it failed."""
    seconds: float
    """From the start of the save until `latest` named it."""
    error: str | None
    """Why there is no checkpoint; None when there is one."""
    last_good: int | None
    """The step that `latest` names, or named when it could last be read."""
    emergency: bool = False
    """It was a copy on the nodes' own disks."""

    def __str__(self) -> str:
        what = "emergency copy" if self.emergency else "checkpoint"
        if self.error is None:
            return f"{what} at step {self.step}: {self.bytes / 1e6:.1f} MB in {self.seconds:.2f} s"
        if self.emergency:
            return f"{what} at step {self.step} failed: {self.error}"
        good = "no good one yet" if self.last_good is None else f"last good is {self.last_good}"
        return f"checkpoint at step {self.step} failed: {self.error}; {good}"


@dataclass
class _Job:
    """A save on its way, in one of its two phases."""

    manifest: Manifest
    began: float
    writing: Future[Written] | None = None
    committing: bool = False
    commit: Future[int] | None = None
    """On rank 0; gives the size of the checkpoint in bytes."""
    copy: Future[int] | None = None
    """In place of both, where it is an emergency copy."""

    @property
    def step(self) -> int:
        return self.manifest.position.step


class Saver:
    """Writes the checkpoints of one run. All methods but `pending_done` are called by all ranks.

    A save passes through two background phases, each ended by a call of `finalize` on all ranks:
    every rank writes its file; then rank 0 writes the manifest and renames the folder. Failures of
    the disk end in a SaveResult, never in an exception.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig,
        ranks: Ranks,
        emergency: Emergency | None = None,
    ) -> None:
        self.emergency = emergency
        self.checkpoints = folders.checkpoints_dir(run_dir)
        self.config, self.ranks = config, ranks
        self._job: _Job | None = None
        self._background = ThreadPoolExecutor(1, "checkpoint", initializer=_give_way)
        self._versions = current_versions()
        self._prepared_for: tuple[Model, Optimizer] | None = None
        self._boxes: list[Box] = []
        self._host = HostCopy([], ranks.device)
        self._entries: list[list[Entry]] = []
        self._report_bytes = 0
        self._last_good = folders.read_latest(self.checkpoints)
        on_first_rank(ranks, self._make_room)

    def _make_room(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        folders.remove_leftovers(self.checkpoints)

    @property
    def pending(self) -> bool:
        """A save is on its way; the same on every rank."""
        return self._job is not None

    def prepare(self, model: Model, optimizer: Optimizer) -> None:
        """Plan what each rank writes and get the host memory for it.

        The first `save` does it if nobody did; done ahead, the first save is as quick as others.
        """
        optimizer.set_steps(optimizer.steps)  # its state is made
        self._boxes = boxes(model, optimizer, to_write=True)
        self._host = HostCopy(self._boxes, self.ranks.device)
        self._entries = self._gather([Entry.of(box) for box in self._boxes])
        most = int(from_first_rank(self.ranks, self._most_boxes))
        self._report_bytes = REPORT_BYTES + REPORT_BYTES_PER_BOX * most
        self._prepared_for = (model, optimizer)

    def _most_boxes(self) -> bytes:
        """On rank 0: the boxes of the rank that has most, after a look that nothing is missing."""
        check_cover(self._entries)
        return str(max((len(of_rank) for of_rank in self._entries), default=0)).encode()

    def save(self, position: Position, model: Model, optimizer: Optimizer) -> list[SaveResult]:
        """Save the state after `position.step`, once an earlier save is done.

        Returns the results of the saves that ended in the call: with `async_save` none, or the
        earlier one; without, this one.
        """
        earlier = self.wait()
        job, host = self._stage(position, model, optimizer), self._host
        folder, rank = self._unfinished(position.step), self.ranks.rank
        job.writing = self._background.submit(lambda: write_tensors(folder, rank, host.finished()))
        self._job = job
        results = [earlier, None if self.config.async_save else self.wait()]
        return [result for result in results if result is not None]

    def copy(self, position: Position, model: Model, optimizer: Optimizer) -> SaveResult | None:
        """Begin an emergency copy of the state; none while an earlier save is on its way.

        Returns its result where it ends in the call, without `async_save`.
        """
        if self._job is not None or self.emergency is None:
            return None
        job, host = self._stage(position, model, optimizer), self._host
        write, entries = self.emergency.write, self._entries
        job.copy = self._background.submit(lambda: write(job.manifest, host.finished(), entries))
        self._job = job
        return None if self.config.async_save else self.wait()

    def _stage(self, position: Position, model: Model, optimizer: Optimizer) -> _Job:
        """Begin to copy the state to host memory; the save to be done with it."""
        began = time.perf_counter()
        if self._prepared_for is None or any(
            given is not known
            for given, known in zip((model, optimizer), self._prepared_for, strict=True)
        ):
            self.prepare(model, optimizer)
        model.gathers.finish()
        manifest = Manifest(  # the cursor goes on changing, so take it as it is now
            position=replace(position, cursor=json.loads(json.dumps(position.cursor))),
            optimizer_steps=optimizer.steps,
            layout=asdict(self.ranks.layout),
            versions=self._versions,
            files={},
        )
        self._host.begin(optimizer)  # numbers read from the device later would wait behind it
        return _Job(manifest, began)

    def pending_done(self) -> bool:
        """Whether this rank's background work is done. Local and instant.

        When it is true on every rank and `pending`, all ranks call `finalize`.
        """
        job = self._job
        work = None if job is None else job.copy or job.commit or job.writing
        return work is None or work.done()

    def finalize(self) -> SaveResult | None:
        """End the phase that is done on all ranks: the result of the save after its last one."""
        job = self._job
        if job is None:
            return None
        if job.copy is not None:
            copied = _outcome(job.copy)
            return self._end_copy(job, copied)
        if job.committing:
            return self._end(job)
        assert job.writing is not None
        written = _outcome(job.writing)
        reports = self._gather_reports(written)
        job.committing = True
        if self.ranks.rank == 0:
            job.commit = self._background.submit(self._commit, job, reports)
        return None

    def wait(self) -> SaveResult | None:
        """Wait for the save on its way, if any; its result."""
        while self._job is not None:
            result = self.finalize()
            if result is not None:
                return result
        return None

    def _unfinished(self, step: int) -> Path:
        return self.checkpoints / f"{UNFINISHED}{folders.name_of(step)}"

    def _commit(self, job: _Job, reports: list[Written | str]) -> int:
        """On rank 0: make the written files a checkpoint, or remove them; its size in bytes."""
        folder = self._unfinished(job.step)
        try:
            errors = [
                f"rank {rank}: {told}" for rank, told in enumerate(reports) if isinstance(told, str)
            ]
            if errors:
                raise OSError("; ".join(errors[:3]))
            written = [report for report in reports if isinstance(report, Written)]
            files = write_index(folder, self._entries, written)
            replace(job.manifest, files=files).write(folder)
            sync_folder(folder)
            folders.publish(self.checkpoints, job.step)
        except BaseException:
            discard(folder)
            raise
        with contextlib.suppress(OSError):  # what could not go now is tried after the next save
            self._prune(job.step)
        return sum(entry.bytes for entry in files.values())

    def _prune(self, newest: int) -> None:
        steps, config = folders.own_steps(self.checkpoints), self.config
        folders.remove_steps(
            self.checkpoints,
            folders.prunable(steps, newest, config.keep_last, config.keep_every_steps),
        )

    def _end_copy(self, job: _Job, size: int | str) -> SaveResult:
        """All ranks know how it went from each other."""
        self._job = None
        return SaveResult(
            step=job.step,
            bytes=size if isinstance(size, int) else 0,
            seconds=time.perf_counter() - job.began,
            error=size if isinstance(size, str) else None,
            last_good=self._latest(),
            emergency=True,
        )

    def _end(self, job: _Job) -> SaveResult:
        """Tell all ranks how it went on rank 0."""
        self._job = None
        payload = None
        if job.commit is not None:
            size = _outcome(job.commit)
            result = SaveResult(
                step=job.step,
                bytes=size if isinstance(size, int) else 0,
                seconds=time.perf_counter() - job.began,
                error=size if isinstance(size, str) else None,
                last_good=self._latest(),
            )
            payload = json.dumps(asdict(result)).encode()
        return SaveResult(**json.loads(broadcast_bytes(payload, self.ranks)))

    def _latest(self) -> int | None:
        """The step that `latest` names; while the folder is gone, the one that it named."""
        step = folders.read_latest(self.checkpoints)
        if step is not None:
            self._last_good = step
        return self._last_good

    def _gather(self, mine: Any) -> list[Any]:
        """What every rank says, on rank 0; empty on the others."""
        if self.ranks.world == 1:
            return [mine]
        all_of_them = [None] * self.ranks.world if self.ranks.rank == 0 else None
        dist.gather_object(mine, all_of_them, dst=0, group=self.ranks.control)
        return all_of_them or []

    def _gather_reports(self, mine: Written | str) -> list[Written | str]:
        """What every rank wrote, or why not, on rank 0. One collective, because training waits."""
        if self.ranks.world == 1:
            return [mine]
        text = json.dumps(mine[:300] if isinstance(mine, str) else asdict(mine)).encode()
        buffer = torch.frombuffer(bytearray(text.ljust(self._report_bytes)), dtype=torch.uint8)
        if self.ranks.rank:
            dist.gather(buffer, None, dst=0, group=self.ranks.control)
            return []
        told = [torch.empty_like(buffer) for _ in range(self.ranks.world)]
        dist.gather(buffer, told, dst=0, group=self.ranks.control)
        return [_report(json.loads(report.numpy().tobytes())) for report in told]


def _report(told: Any) -> Written | str:
    if isinstance(told, str):
        return told
    places = tuple((began, size) for began, size in told["places"])
    return Written(told["file"], FileSum(**told["sum"]), places)


def _outcome(work: Future[T]) -> T | str:
    """What background work gave, or in one line why it failed: whatever it is, the run goes on."""
    error = work.exception()
    if error is None:
        return work.result()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return one_line(error)


def _give_way() -> None:
    """Let training go first where the background thread meets it on a core. (A process of its
    own could not share pinned memory, and the long parts of a write, which are copying, summing,
    writing and syncing, let go of the interpreter lock.)"""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
