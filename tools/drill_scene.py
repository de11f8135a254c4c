"""The run that a drill is about."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from drive import Job, free_port

from megascale.monitor.events import read_events
from megascale.monitor.metrics import read_rows

PATIENCE_S = 300.0
"""For a fault to be noticed, and to be got over."""
WORDS = ("--nodes=2", "--join-s=60", "--hang-s=10")
NAN_EVERY = 97
"""Steps between two whose gradients are NaN."""


class Scene:
    """A run that faults befall, and the scheduler that requeues its job."""

    def __init__(self, config: Path, folder: Path, disk: Path, seed: int) -> None:
        """`disk` is where the run lies, alone on its file system where it is to be filled."""
        self.random = random.Random(seed)
        self.run_dir, self._config, self._folder = disk / "run", config, folder
        self._control = folder / "control"
        self.control()
        self._port, self._starts = free_port(), 0
        self.proxy = Proxy(self._port)
        self.job = self._start()

    def _start(self) -> Job:
        self._starts += 1
        return Job(
            self._config,
            self.run_dir,
            2,
            *WORDS,
            folder=self._folder,
            ports=(self._port, self.proxy.port),
            environment=environment(self._control),
        )

    def close(self) -> None:
        """End all processes."""
        self.job.__exit__()
        self.proxy.close()

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Until `done`. A job that has ended is started again; raises AssertionError where the
        run was given up, and where it takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            time.sleep(0.02)
            statuses = [driver.poll() for driver in self.job.drivers]
            if None not in statuses:
                if {2, 3} & set(statuses):
                    raise AssertionError(f"{what}: drivers ended with {statuses}\n{self.said()}")
                self.job = self._start()
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {PATIENCE_S:g} s\n{self.said()}")

    def any_node(self) -> int:
        """The number of a node."""
        return self.random.randrange(2)

    def step(self) -> int:
        """The last step whose metrics are written."""
        with contextlib.suppress(OSError):
            rows = [row for row in read_rows(self.run_dir / "metrics.jsonl") if "loss" in row]
            return int(rows[-1]["step"]) if rows else 0
        return 0

    def saved(self) -> int:
        """The step of the latest checkpoint."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.run_dir / "checkpoints/latest").read_text())
        return 0

    def count(self, kind: str, **facts: object) -> int:
        """Events of a kind so far, with these facts among theirs."""
        wanted = {"event": kind, **facts}.items()
        return sum(wanted <= _simple(event).items() for event in read_events(self.run_dir))

    def new_event(self, kind: str, **facts: object) -> Callable[[], bool]:
        """Whether there is one of a kind that is not there yet."""
        before = self.count(kind, **facts)
        return lambda: self.count(kind, **facts) > before

    def new_words(self, words: str) -> Callable[[], bool]:
        """Whether a driver or a rank says what it has not said yet."""
        before = self.output().count(words)
        return lambda: self.output().count(words) > before

    def new_job(self) -> Callable[[], bool]:
        """Whether the job was requeued."""
        before = self._starts
        return lambda: self._starts > before

    def control(self, ahead_s: float = 0.0, slow_rank: int | None = None) -> None:
        """Have the wall clock of all processes be wrong, or a rank be slow."""
        write_control(self._control, ahead_s, slow_rank)

    def output(self) -> str:
        """All that drivers and ranks have printed."""
        return "".join(path.read_text(errors="replace") for path in self.job.outputs)

    def said(self) -> str:
        """The end of it."""
        return self.job.said()


def _simple(event: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in event.items() if isinstance(value, (int, str))}


def environment(control: Path) -> dict[str, str]:
    """Of the processes of a drill."""
    hooks = str(Path(__file__).parent / "drill_hooks")
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([hooks, root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": paths,
        "DRILL_CONTROL": str(control),
        "DRILL_NAN_EVERY": str(NAN_EVERY),
        "MEGASCALE_TOKEN": secrets.token_hex(32),
    }


class Proxy:
    """Stands between the driver of a node and the leading one, and can be cut."""

    def __init__(self, to_port: int) -> None:
        self._to_port, self._whole = to_port, threading.Event()
        self._whole.set()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and new ones at once."""
        self._whole.clear()
        for one in list(self._open):
            _end(one)

    def restore(self) -> None:
        """Let connections pass again."""
        self._whole.set()

    def close(self) -> None:
        """End it."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                try:
                    if not self._whole.is_set():
                        raise ConnectionError
                    there = socket.create_connection(("127.0.0.1", self._to_port))
                except OSError:
                    here.close()
                    continue
                self._open |= {here, there}
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := one.recv(2**16):
                other.sendall(content)
        _end(one)
        _end(other)
        self._open -= {one, other}


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def write_control(path: Path, ahead_s: float, slow_rank: int | None) -> None:
    """What `drill_hooks` do to the drill's processes."""
    slow = 0 if slow_rank is None else slow_rank + 1
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(struct.pack("dd", ahead_s, slow))
