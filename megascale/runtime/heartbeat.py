"""Signs of life of a rank: a page of shared memory that it writes and its driver reads.

The training loop only stores a few whole numbers, without a lock or a system call, and no thread of
the rank is needed to tell of them, so the page is there to read also when the rank is stopped or
does not let go of the interpreter. torch's collectives are marked where they begin, and where
somebody waits for them (`watch_collectives`).
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from megascale.runtime.files import write_file

FOLDER_VARIABLE = "MEGASCALE_PULSE"
"""The folder of a node's pages, which its driver sets."""
STACK_SIGNAL = signal.SIGUSR2
"""Has a rank write the stacks of its threads, whatever it is doing."""
PHASES = (
    "starting",
    "planning",
    "micro-batches",
    "gradients",
    "optimizer",
    "profiling",
    "reporting",
    "evaluation",
    "saving",
    "restoring",
    "ended",
)
"""What a rank may be at."""
COLLECTIVES = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all-gather",
    "allgather_coalesced": "all-gather",
    "all_gather_single": "all-gather",
    "all_gather_single_coalesced": "all-gather",
    "_allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_single_coalesced": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv": "receive",
    "recv_anysource": "receive",
}
"""Methods of torch's process groups, of any version, and what they are called."""
NAMES = ("", *dict.fromkeys(COLLECTIVES.values()))
POINT_TO_POINT = ("send", "receive")
PID, RANK, STEP, STEPS, PHASE, MARKS, CALLS, LAST, WAITS, WAITING_SINCE, WAITED, SINCE, MEMORY = (
    range(13)
)
DUMP = 13
SPENT = 16
WORDS = SPENT + len(PHASES)
DUMP_POLL_S = 1.0


class Pulse:
    """What this rank tells of itself; before `open`, nobody."""

    def __init__(self) -> None:
        self._page: Any = memoryview(bytearray(8 * WORDS)).cast("q")
        self._main = threading.get_ident()
        self._page[SINCE] = time.monotonic_ns()

    def open(self, path: Path, rank: int) -> None:
        """Write to the page `path` from now on; for the main thread."""
        self._page = open_page(path)
        self._main = threading.get_ident()
        page = self._page
        page[RANK], page[SINCE] = rank, time.monotonic_ns()
        page[PID] = os.getpid()

    def enter(self, phase: str) -> None:
        """Begin another part of the step; one of PHASES."""
        page, now = self._page, time.monotonic_ns()
        page[SPENT + page[PHASE]] += now - page[SINCE]
        page[SINCE] = now
        page[PHASE] = PHASES.index(phase)
        page[MARKS] += 1

    def restart(self) -> None:
        """A run begins, be it the first or the second of this process."""
        self._page[STEPS] = 0
        self.enter("starting")

    def begin_at(self, step: int) -> None:
        """The run goes on after `step`."""
        self._page[STEP] = step

    def step(self, step: int, memory_bytes: int) -> None:
        """Step `step` is done; `memory_bytes` are those of the device."""
        page = self._page
        page[STEP], page[MEMORY] = step, memory_bytes
        page[STEPS] += 1
        page[MARKS] += 1

    def mark(self) -> None:
        """Something goes on."""
        self._page[MARKS] += 1

    def begin(self, name: int, is_collective: bool) -> None:
        """An operation over ranks begins; `name` is its place in NAMES."""
        if threading.get_ident() == self._main:
            page = self._page
            page[LAST] = name
            page[CALLS] += is_collective
            page[MARKS] += 1

    def begin_wait(self) -> bool:
        """This rank begins to wait for others; whether `end_wait` has to follow."""
        page = self._page
        if page[WAITS] or threading.get_ident() != self._main:
            return False
        page[WAITING_SINCE] = time.monotonic_ns()
        page[WAITS] = 1
        page[MARKS] += 1
        return True

    def end_wait(self) -> None:
        """It waits no more."""
        page = self._page
        page[WAITED] += time.monotonic_ns() - page[WAITING_SINCE]
        page[WAITS] = 0
        page[MARKS] += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In the block this rank waits for others."""
        begun = self.begin_wait()
        try:
            yield
        finally:
            if begun:
                self.end_wait()


pulse = Pulse()
"""The one of this process."""


def open_page(path: Path) -> Any:
    """A page as whole numbers in shared memory; its file must be there."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 8 * WORDS)).cast("q")


def make_pages(folder: Path, count: int) -> list[Any]:
    """Make the pages of a node's ranks, before these are started, and open them."""
    pages = []
    for local_rank in range(count):
        path = folder / f"rank{local_rank}.page"
        path.write_bytes(bytes(8 * WORDS))
        pages.append(open_page(path))
    return pages


def stack_file(folder: Path, local_rank: int) -> Path:
    """Where a rank writes its stacks when it is sent STACK_SIGNAL."""
    return folder / f"rank{local_rank}.stack"


def flight_file(folder: Path, local_rank: int) -> Path:
    """Where a rank writes what torch's flight recorder holds, when its page asks for it."""
    return folder / f"rank{local_rank}.flight"


def begin_pulse() -> None:
    """Let the driver of this node know how this rank is, where there is one that listens."""
    if FOLDER_VARIABLE not in os.environ:
        return
    folder, local_rank = Path(os.environ[FOLDER_VARIABLE]), int(os.environ["LOCAL_RANK"])
    stacks = open(stack_file(folder, local_rank), "w", encoding="utf-8")
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    pulse.open(folder / f"rank{local_rank}.page", int(os.environ["RANK"]))
    watch_collectives()
    flight = flight_file(folder, local_rank)
    threading.Thread(target=_serve_dumps, args=(flight,), daemon=True, name="flight").start()


def watch_collectives() -> None:
    """Mark what torch's process groups begin, and where anybody waits for it. For good."""
    import torch.distributed as dist

    if hasattr(dist.Work.wait, "__wrapped__"):
        return
    for method, name in COLLECTIVES.items():
        if hasattr(dist.ProcessGroup, method):
            is_collective = name not in POINT_TO_POINT
            _replace(dist.ProcessGroup, method, partial(_begun, NAMES.index(name), is_collective))
    _replace(dist.Work, "wait", _waited)


def _replace(owner: type, method: str, wrap: Callable[[Any], Any]) -> None:
    call = getattr(owner, method)
    setattr(owner, method, wraps(call)(wrap(call)))


def _begun(name: int, is_collective: bool, call: Callable[..., Any]) -> Callable[..., Any]:
    def begun(group: Any, *given: Any, **named: Any) -> Any:
        pulse.begin(name, is_collective)
        return call(group, *given, **named)

    return begun


def _waited(wait: Callable[..., Any]) -> Callable[..., Any]:
    def waited(work: Any, *given: Any, **named: Any) -> Any:
        begun = pulse.begin_wait()
        try:
            return wait(work, *given, **named)
        finally:
            if begun:
                pulse.end_wait()

    return waited


def _serve_dumps(path: Path) -> None:
    """Write the flight recorder's record once the page asks for it."""
    while not pulse._page[DUMP]:
        time.sleep(DUMP_POLL_S)
    write_file(path, flight_record())


def flight_record() -> bytes:
    """The latest operations over ranks, as torch's flight recorder knows them, as JSON; `{}` where
    torch has none. It keeps as many as TORCH_FR_BUFFER_SIZE says."""
    recorder = sys.modules.get("torch._C._distributed_c10d")
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if hasattr(recorder, name):
            return bytes(getattr(recorder, name)())
    return b"{}"
