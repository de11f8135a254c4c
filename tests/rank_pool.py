"""Worker processes that run a function as the ranks of one world, over gloo."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drive import free_port

MOST_THREADS = 600
"""Of a worker, which is replaced then: process groups that something still holds leave two
threads each behind."""


class RankPools:
    """Pools of 1 to 4 ranks, started when first asked for and used again."""

    def __init__(self, device: str = "cpu") -> None:
        """`device` is that of the ranks, cpu or cuda."""
        self._device = device
        self._workers: list[Worker] = []

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300
    ) -> list[Any]:
        """Call `function(*args)` on `world` ranks; their results in order of rank.

        A rank that raises fails the call with its traceback. When the call takes longer than
        `timeout_s`, the ranks are killed and the error holds the Python stacks of all.
        """
        # one that was killed from outside fails no test but the one that it was in
        self._workers = [worker for worker in self._workers if worker.process.is_alive()]
        while len(self._workers) < world:
            self._workers.append(Worker(self._device))
        workers, port = self._workers[:world], free_port()
        task = (function.__module__, function.__qualname__, args)
        for rank, worker in enumerate(workers):
            worker.pipe.send((rank, world, port, task))
        deadline = time.monotonic() + timeout_s
        answers = [worker.answer(deadline) for worker in workers]
        if any(answer is None for answer in answers):
            silent = [rank for rank, answer in enumerate(answers) if answer is None]
            raised = [text for answer in answers if answer for ok, text in [answer] if not ok]
            dead = [rank for rank in silent if not workers[rank].process.is_alive()]
            problem = f"ranks {silent} did not answer in {timeout_s} s; of them died: {dead}"
            stacks = self._dump_and_kill()
            raise AssertionError("\n".join([problem, *raised, *stacks]))
        for rank, worker in enumerate(workers):
            if worker.num_threads() > MOST_THREADS:
                worker.kill()
                self._workers[rank] = Worker(self._device)
        errors = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _dump_and_kill(self) -> list[str]:
        stacks = [f"stacks of rank {r}:\n{w.stacks()}" for r, w in enumerate(self._workers)]
        self.close()
        return stacks


class Worker:
    """One process, which takes calls until it is killed."""

    def __init__(self, device: str) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        handle, self._dump = tempfile.mkstemp(prefix="rank-stacks-")
        os.close(handle)
        self.process = context.Process(target=_serve, args=(theirs, sys.path, self._dump, device))
        self.process.daemon = True
        self.process.start()
        theirs.close()

    def answer(self, deadline: float) -> tuple[bool, Any] | None:
        """(whether it returned, result or traceback); None when it is late or dead."""
        try:
            if self.pipe.poll(max(0.0, deadline - time.monotonic())):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(60)  # the pipe of a dead process closes before it is gone
        return None

    def num_threads(self) -> int:
        """Threads of the process; 0 where that cannot be told."""
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/task"))
        except OSError:
            return 0

    def stacks(self) -> str:
        """What every thread of the process does now; empty when it is dead."""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signal.SIGUSR2)
            time.sleep(0.3)
        return Path(self._dump).read_text()

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        Path(self._dump).unlink(missing_ok=True)


def _serve(pipe: Any, path: list[str], dump: str, device: str) -> None:
    sys.path[:] = path
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also where there are devices
    faulthandler.register(signal.SIGUSR2, file=open(dump, "w"), all_threads=True)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, port, task = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        pipe.send(_call(*task))


def _call(module: str, name: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    from importlib import import_module

    import torch.distributed as dist

    from megascale.runtime import distributed

    try:
        distributed.prepare_device("auto")
        return True, getattr(import_module(module), name)(*args)
    except Exception:
        return False, traceback.format_exc()
    finally:
        with contextlib.suppress(Exception):
            distributed.stop()
            if dist.is_initialized():  # what the function has made itself
                dist.destroy_process_group()
        gc.collect()  # models are cycles, and hold the groups: three threads each that stay awake
