"""Ranks of one machine that `megascale train --ranks N` starts, and whose end it owns.

The starter, which is the process that the user has started, waits for the ranks and for the store
on which they meet, a process too. It passes on signals, ends what is left when a rank has failed,
and prints the one line that says why. Ranks lead sessions of their own, so the terminal's signals
reach the starter alone. They die with it. What they write to stderr goes to their logs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from megascale.config.load import whole_number
from megascale.errors import RankError, UserError, plain_file_errors
from megascale.launch.channel import listen
from megascale.launch.failures import KILL, Cause, cause_of_rank, culprit
from megascale.launch.leader import BAD_INPUT
from megascale.launch.meeting import start_meeting
from megascale.monitor.events import EventLog, at, read_events
from megascale.monitor.metrics import last_step
from megascale.parsing import read_json
from megascale.runtime.logs import STARTER_VARIABLE, is_noted, note_failure
from megascale.runtime.processes import adopt_orphans, die_with_parent, end_descendants
from megascale.runtime.scratch import scratch_folder
from megascale.runtime.signals import SIGNALS, StopRequest

MOST_RANKS = 1024
RANK_BYTES = 250 << 20
"""Memory of a rank that has imported torch and megatron-core and has no model yet, about."""
HOST = "127.0.0.1"
ERROR_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""The file in which a rank leaves the exception that ends it, by torch's name for it."""
STORE_OUTPUT = "store.txt"
POLL_S = 0.1
REPORTS_S = 3.0
"""For the other ranks to end and to say why, after the first has failed."""
LOST_S = 20.0
"""The same, while all that have ended only lost a peer, or stopped as they were asked."""
AT_ONCE_S = 3.0
"""For ranks that are stopped at once to note it, before they are killed."""


@dataclass(frozen=True)
class RankJob:
    """What the ranks do."""

    command: tuple[str, ...]
    """The command line of every rank."""
    count: int
    logs: Path
    """Folder of the ranks' logs, made only where a rank fails."""
    advice: str
    """What a user may type next."""
    run_dir: Path | None = None
    """Of the run, where it is one."""


def rank_count(text: str | None) -> int:
    """How many ranks `--ranks` asks this process to start; 1: it does the work itself.

    Raises UserError for what is no number of ranks, and on ranks that others have started.
    """
    if text is None:
        return 1
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--ranks {text}: torchrun has started ranks already (WORLD_SIZE is set); leave out "
            "--ranks, or torchrun"
        )
    return ranks_that_fit(text, "--ranks")


def ranks_that_fit(text: str, option: str) -> int:
    """The number of ranks that `option` asks for on this machine.

    Raises UserError for what is no number of ranks, and for more ranks than memory is free for.
    """
    count, free = whole_number(text, option, 1, MOST_RANKS), psutil.virtual_memory().available
    if count > 1 and count * RANK_BYTES > free:
        raise UserError(
            f"{option} {text}: a rank takes about {RANK_BYTES / 1e9:.2f} GB before it has a model, "
            f"and {free / 1e9:.1f} GB are free here; at most {max(1, free // RANK_BYTES)} ranks fit"
        )
    return count


def megascale(*words: str) -> tuple[str, ...]:
    """The command line of `megascale WORDS` with this interpreter."""
    return (sys.executable, "-m", "megascale", *words)


def as_rank(work: Callable[[], int]) -> int:
    """Do the `work` of a rank; its exit status.

    Where torchrun or `run_ranks` has started this process, it dies with that one, and leaves it
    the cause of a failure. A rank of `run_ranks` prints no traceback.
    """
    if ERROR_VARIABLE not in os.environ:
        return work()
    die_with_parent()
    starter = os.environ.get(STARTER_VARIABLE)
    if starter is not None and int(starter) != os.getppid():  # gone before it could be seen
        os.kill(os.getpid(), signal.SIGKILL)
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        status = record(partial(_plainly, work))()
    except UserError:
        raise
    except Exception as error:
        if starter is None:
            raise
        note_failure(error)
        return 1
    assert status is not None
    return status


def _plainly(work: Callable[[], int]) -> int:
    """Do the `work`; an error of a file that no log has yet is one line."""
    with plain_file_errors(unless=is_noted):
        return work()


def run_ranks(job: RankJob, asked: StopRequest) -> int:
    """Start the ranks and wait until they have ended.

    `asked` holds the signals since the command began; it must hear a second one of each kind. The
    first lets the ranks save and stop, a second one ends them at once. Returns 0 where all ended
    well or were asked to stop, 1 where a rank failed, 2 for bad input, and 130 after a second
    signal.
    """
    if asked:
        return _say(f"stopped by {asked.signal_name}; there was nothing to save", 0)
    adopt_orphans()
    with scratch_folder(tempfile.gettempdir()) as folder, listen(HOST, 0) as listener:
        ranks = LocalRanks(job, folder, asked)
        try:
            ranks.start(listener)
            ranks.wait()
        except KeyboardInterrupt:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            ranks.stop_at_once()
            return _say(f"stopped at once by a second signal; {job.advice}", 130)
        finally:
            end_descendants()
        return ranks.conclude()


class LocalRanks:
    """The processes of a job, and why they ended."""

    def __init__(self, job: RankJob, folder: Path, asked: StopRequest) -> None:
        """`folder` takes what ranks leave behind. None is started yet."""
        self._job, self._folder, self._asked = job, folder, asked
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store: subprocess.Popen[bytes] | None = None
        self._store_ended = False
        self._num_asked = 0
        """Of the processes, from the first on, so many were asked to stop."""
        self._causes: dict[int, Cause] = {}
        self._began = time.time()
        self._ended_early = False
        """Some rank was asked to stop while there was nothing for it to save."""
        asked.at_first = self._ask  # at once, whatever this process is doing

    def start(self, listener: socket.socket) -> None:
        """Start all ranks, and the store on which they meet. Raises UserError where that cannot
        be."""
        try:
            self._store = start_meeting(listener, HOST, self._folder / STORE_OUTPUT)
            self._start(listener.getsockname()[1])
        except OSError as error:
            raise UserError(
                f"{self._job.count} ranks cannot be started here ({error.strerror}); start fewer"
            ) from None

    def _start(self, port: int) -> None:
        for rank in range(self._job.count):
            if self._asked:  # those that have started are ended by `wait`
                return
            with self._output(rank).open("wb") as output:
                process = subprocess.Popen(
                    self._job.command,
                    stdin=subprocess.DEVNULL,
                    stderr=output,
                    env=self._environment(rank, port),
                    start_new_session=True,
                )
            self._processes.append(process)

    def wait(self) -> None:
        """Wait until all ranks have ended, or until one has failed and the others had time to."""
        failed_at = None
        while any(process.poll() is None for process in self._processes):
            now = time.monotonic()
            if self._asked:
                self._ask()
            self._look()
            if self._store is not None and self._store.poll() is not None:
                self._store_ended = True
                return
            if self._causes or self._ended_early:
                failed_at = failed_at or now
                if now - failed_at > self._patience_s():
                    return
            time.sleep(POLL_S)
        self._look()

    def stop_at_once(self) -> None:
        """Have ranks that were asked to stop end at once; they may note that they were."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + AT_ONCE_S
        while time.monotonic() < deadline and any(one.poll() is None for one in self._processes):
            time.sleep(POLL_S)

    def conclude(self) -> int:
        """Say how the ranks ended, where they have not said it; the exit status."""
        causes = list(self._causes.values())
        if self._store_ended and not causes:
            words = (self._folder / STORE_OUTPUT).read_text(errors="replace").split("\n")
            why = next((line for line in reversed(words) if line.strip()), "it was killed")
            return _say(f"the store on which ranks meet has ended: {why}; {self._job.advice}", 1)
        if self._ended_early and all(cause.lost_a_peer for cause in causes):
            return _say(f"stopped by {self._asked.signal_name}; there was nothing to save", 0)
        if not causes:
            return 0
        cause = culprit(causes)
        kind, _, text = cause.error.partition(": ")
        if text and self._processes[cause.rank or 0].returncode == BAD_INPUT:
            return _say(f"rank {cause.rank}: {text}" if kind == RankError.__name__ else text, 2)
        self._keep_output()
        if cause.was_killed:
            self._note(cause)
        return _say(f"{self._fault(cause)}; {self._job.advice}", 1)

    def _fault(self, cause: Cause) -> str:
        first_line = cause.error.strip().split("\n")[0]
        if cause.kind == KILL:
            return f"rank {cause.rank} was {first_line}, by a person or for want of memory"
        return f"rank {cause.rank}: {first_line}; see {self._log(cause.rank or 0)}"

    def _note(self, cause: Cause) -> None:
        """Write into the diary of the run what a rank that was killed could not."""
        run_dir = self._job.run_dir
        if run_dir is None or not run_dir.is_dir():
            return
        with suppress(OSError):
            starts = [one for one in read_events(run_dir) if one["event"] == "start"]
            starting = not starts or at(starts[-1]) < self._began
            facts = {"error": cause.error, "rank": cause.rank, "starting": starting}
            node = socket.gethostname()
            EventLog(run_dir).write("error", step=last_step(run_dir), node=node, **facts)

    def _look(self) -> None:
        """Note why ranks have failed, each once."""
        for rank, process in enumerate(self._processes):
            status = process.poll()
            if not status or rank in self._causes:
                continue
            if status == -signal.SIGTERM and self._num_asked:
                self._ended_early = True
                continue
            message, when = None, time.time()
            with suppress(OSError, ValueError, KeyError, TypeError):
                file = self._error_file(rank)
                message = str(read_json(file)["message"]["message"])
                when = file.stat().st_mtime
            self._causes[rank] = cause_of_rank(rank, status, message, when)

    def _patience_s(self) -> float:
        only_lost = all(cause.lost_a_peer for cause in self._causes.values())
        return LOST_S if only_lost else REPORTS_S

    def _ask(self) -> None:
        """Ask the ranks to stop that were not asked before."""
        begin, self._num_asked = self._num_asked, len(self._processes)
        for process in self._processes[begin:]:
            process.send_signal(signal.SIGTERM)

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        count = self._job.count
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        return {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": str(True),  # the starter serves it, and not rank 0
            ERROR_VARIABLE: str(self._error_file(rank)),
            STARTER_VARIABLE: str(os.getpid()),
        }

    def _keep_output(self) -> None:
        """Add to the logs what ranks wrote to stderr before they had a log."""
        for rank in range(len(self._processes)):
            words = self._output(rank).read_bytes()
            if words:
                with suppress(OSError):
                    self._job.logs.mkdir(parents=True, exist_ok=True)
                    with self._log(rank).open("ab") as log:
                        log.write(words)

    def _log(self, rank: int) -> Path:
        return self._job.logs / f"rank{rank}.log"

    def _output(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.txt"

    def _error_file(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.json"


def _say(text: str, status: int) -> int:
    """Print the one line; the status. A terminal that is gone is no error."""
    with suppress(OSError):
        print(f"megascale: {text}", file=sys.stderr, flush=True)
    return status
