"""Chrome traces of a few steps, and snapshots of CUDA memory, on demand.

What fails here is reported and given up; the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.config.schema import MonitorConfig
from megascale.runtime.logs import say

if TYPE_CHECKING:
    from megascale.runtime.distributed import Ranks

Failed = Callable[[str, Exception], None]
"""Takes what was given up, and why."""


@contextmanager
def profiler(
    config: MonitorConfig, run_dir: str | Path, ranks: Ranks, failed: Failed
) -> Iterator[Callable[[], None]]:
    """Record what `config` asks for; yields a function to call after every step.

    Writes `profile/rank<r>.trace.json.gz` in the run folder for `profile_steps`, counted from 1
    at the start of this process, and `profile/rank<r>.memory.pickle` at the end, by success or
    failure, for `memory_snapshot`. What goes wrong is told to `failed`.
    """
    folder = Path(run_dir) / "profile"
    with ExitStack() as leave:
        if config.memory_snapshot:
            with _tried("memory snapshot", failed):
                _record_memory(folder, ranks, leave, failed)
        if config.profile_steps is None:
            yield _nothing
            return
        first, last = config.profile_steps
        trace = _Trace(first, last, folder / f"rank{ranks.rank}.trace.json.gz", failed)
        leave.callback(trace.stop)
        yield trace.done_step


def _nothing() -> None:
    """Nothing is recorded."""


@contextmanager
def _tried(what: str, failed: Failed) -> Iterator[None]:
    """Report an error of the block instead of passing it on."""
    try:
        yield
    except Exception as error:
        failed(what, error)


class _Trace:
    def __init__(self, first: int, last: int, path: Path, failed: Failed) -> None:
        self._first, self._last, self._path, self._failed = first, last, path, failed
        self._done = 0
        self._profile: Any = None
        self._start_if_due()

    def done_step(self) -> None:
        self._done += 1
        if self._done == self._last:
            self.stop()
        self._start_if_due()

    def stop(self) -> None:
        """Write the trace if one is being taken, also when the run ends inside its steps."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        with _tried("profile", self._failed):
            profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._path))
            say(f"wrote {self._path}")

    def _start_if_due(self) -> None:
        if self._done + 1 != self._first:
            return
        import torch

        with _tried("profile", self._failed):
            profile = torch.profiler.profile()  # of every activity this machine has
            profile.start()
            self._profile = profile


def _record_memory(folder: Path, ranks: Ranks, leave: ExitStack, failed: Failed) -> None:
    if ranks.device.type != "cuda":
        if ranks.rank == 0:
            say("warning: monitor.memory_snapshot is ignored: it needs CUDA")
        return
    import torch

    torch.cuda.memory._record_memory_history(max_entries=100_000)

    def dump() -> None:
        with _tried("memory snapshot", failed):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank{ranks.rank}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            say(f"wrote {path}")

    leave.callback(dump)
