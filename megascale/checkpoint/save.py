"""Saving in two stages: copy to host memory while the step waits, write while training goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.checkpoint import folder as folders
from megascale.checkpoint.manifest import Manifest, Position, current_versions
from megascale.checkpoint.shards import Box, boxes, optimizer_steps, set_optimizer_steps
from megascale.checkpoint.storage import (
    Entry,
    Written,
    check_cover,
    one_line,
    write_index,
    write_tensors,
)
from megascale.config import CheckpointConfig
from megascale.runtime.distributed import Ranks, broadcast_bytes


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
    """The step that `latest` names now."""

    def __str__(self) -> str:
        if self.error is None:
            return (
                f"checkpoint at step {self.step}: {self.bytes / 1e6:.1f} MB in {self.seconds:.2f} s"
            )
        good = "no good one yet" if self.last_good is None else f"last good is {self.last_good}"
        return f"checkpoint at step {self.step} failed: {self.error}; {good}"


@dataclass
class _Job:
    """A save on its way. Only the background thread writes to it until the thread is joined."""

    manifest: Manifest
    began: float
    thread: threading.Thread | None = None
    written: Written | None = None
    error: str | None = None
    committing: bool = False
    size: int = 0

    @property
    def step(self) -> int:
        return self.manifest.position.step


class Saver:
    """Writes the checkpoints of one run. All methods but `pending_done` are called by all ranks.

    A save passes through two background phases, each ended by a call of `finalize` on all ranks:
    every rank writes its file; then rank 0 writes the manifest and renames the folder. Failures of
    the disk end in a SaveResult, never in an exception.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.checkpoints = folders.checkpoints_dir(run_dir)
        self.config, self.ranks = config, ranks
        self._job: _Job | None = None
        self._prepared_for: tuple[Any, Any] | None = None
        self._boxes: list[Box] = []
        self._host: list[torch.Tensor] = []
        self._entries: list[list[Entry]] = []
        if ranks.rank == 0:
            folders.remove_leftovers(self.checkpoints)

    @property
    def pending(self) -> bool:
        """A save is on its way; the same on every rank."""
        return self._job is not None

    def prepare(self, model: Any, optimizer: Any) -> None:
        """Plan what each rank writes and get the host memory for it.

        The first `save` does it if nobody did; done ahead, the first save is as quick as others.
        """
        set_optimizer_steps(optimizer, optimizer_steps(optimizer))
        self._boxes = boxes(model, optimizer, to_write=True)
        on_cuda = self.ranks.device.type == "cuda"
        lives = [box.live() for box in self._boxes]
        self._host = [
            torch.zeros(live.shape, dtype=live.dtype, device="cpu", pin_memory=on_cuda)
            for live in lives
        ]
        self._entries = self._gather([Entry.of(box) for box in self._boxes])
        if self.ranks.rank == 0:
            check_cover(self._entries)
        self._prepared_for = (model, optimizer)

    def save(self, position: Position, model: Any, optimizer: Any) -> list[SaveResult]:
        """Save the state after `position.step`, once an earlier save is done.

        Returns the results of the saves that ended in the call: with `async_save` none, or the
        earlier one; without, this one.
        """
        earlier = self.wait()
        began = time.perf_counter()
        if self._prepared_for is None or any(
            given is not known
            for given, known in zip((model, optimizer), self._prepared_for, strict=True)
        ):
            self.prepare(model, optimizer)
        self._copy_to_host()
        manifest = Manifest(  # the cursor goes on changing, so take it as it is now
            position=replace(position, cursor=json.loads(json.dumps(position.cursor))),
            optimizer_steps=optimizer_steps(optimizer),
            layout=asdict(self.ranks.layout),
            versions=current_versions(),
            files={},
        )
        self._job = _Job(manifest, began)
        self._start(self._job, self._write)
        results = [earlier, None if self.config.async_save else self.wait()]
        return [result for result in results if result is not None]

    def pending_done(self) -> bool:
        """Whether this rank's background work is done. Local and instant.

        When it is true on every rank and `pending`, all ranks call `finalize`.
        """
        thread = self._job.thread if self._job else None
        return thread is None or not thread.is_alive()

    def finalize(self) -> SaveResult | None:
        """End the phase that is done on all ranks: the result of the save after its last one."""
        job = self._job
        if job is None:
            return None
        if job.thread is not None:
            job.thread.join()
            job.thread = None
        if job.committing:
            return self._end(job)
        reports = self._gather((job.written, job.error))
        job.committing = True
        if self.ranks.rank == 0:
            self._start(job, lambda job: self._commit(job, reports))
        return None

    def wait(self) -> SaveResult | None:
        """Wait for the save on its way, if any; its result."""
        while self._job is not None:
            result = self.finalize()
            if result is not None:
                return result
        return None

    def _copy_to_host(self) -> None:
        for box, host in zip(self._boxes, self._host, strict=True):
            host.copy_(box.live(), non_blocking=True)
        if self.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _start(self, job: _Job, phase: Any) -> None:
        """Run a phase in a thread. A process could not share pinned memory, and all the long parts
        (copying, summing, writing, syncing) let go of the interpreter lock."""

        def run() -> None:
            if sys.platform == "linux":  # where a thread has a priority of its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            try:
                phase(job)
            except Exception as error:  # whatever it is, the run goes on
                job.error = getattr(error, "strerror", None) or one_line(error)

        job.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        job.thread.start()

    def _unfinished(self, job: _Job) -> Path:
        return self.checkpoints / f"{folders.UNFINISHED}{folders.name_of(job.step)}"

    def _write(self, job: _Job) -> None:
        job.written = write_tensors(self._unfinished(job), self.ranks.rank, self._host)

    def _commit(self, job: _Job, reports: list[tuple[Written | None, str | None]]) -> None:
        """On rank 0: make the written files a checkpoint, or remove them."""
        folder = self._unfinished(job)
        try:
            errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error]
            if errors:
                raise OSError("; ".join(errors[:3]))
            written = [report for report, _ in reports if report is not None]
            files = write_index(folder, self._entries, written)
            Manifest(**(vars(job.manifest) | {"files": files})).write(folder)
            folders.sync_folder(folder)
            folders.publish(self.checkpoints, job.step)
            job.size = sum(entry.bytes for entry in files.values())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):  # what could not go now is tried after the next save
            self._prune(job.step)

    def _prune(self, newest: int) -> None:
        steps, config = folders.steps_in(self.checkpoints), self.config
        folders.remove_steps(
            self.checkpoints,
            folders.prunable(steps, newest, config.keep_last, config.keep_every_steps),
        )

    def _end(self, job: _Job) -> SaveResult:
        """Tell all ranks how it went on rank 0."""
        self._job = None
        result = SaveResult(
            step=job.step,
            bytes=job.size,
            seconds=time.perf_counter() - job.began,
            error=job.error,
            last_good=folders.read_latest(self.checkpoints),
        )
        told = broadcast_bytes(json.dumps(asdict(result)).encode(), self.ranks)
        return SaveResult(**json.loads(told))

    def _gather(self, mine: Any) -> list[Any]:
        """What every rank says, on rank 0; empty on the others."""
        if self.ranks.world == 1:
            return [mine]
        all_of_them = [None] * self.ranks.world if self.ranks.rank == 0 else None
        dist.gather_object(mine, all_of_them, dst=0, group=self.ranks.control)
        return all_of_them or []
