"""Nodes of a job on one machine: one driver each, whose output is kept."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from megascale.monitor.events import read_events

QUICK = ("--backoff-s=0.2", "--lost-s=8")


class Job:
    """Drivers of `num_nodes` nodes called n0, n1 ...; ended with the block."""

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        num_nodes: int,
        *words: str,
        job: str = "7",
        folder: Path | None = None,
        ports: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`words` follow `megascale launch CONFIG`. `folder` takes the output, beside the run if
        None; `ports` are where each node looks for the driver of node 0."""
        self.run_dir, self.outputs = run_dir, []
        folder = run_dir.parent if folder is None else folder
        tools = folder / "tools"
        tools.mkdir(parents=True, exist_ok=True)
        self.requeued = tools / "requeued"
        (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{self.requeued}\n')
        (tools / "scontrol").chmod(0o755)
        command = [sys.executable, "-m", "megascale", "launch", str(config), f"run_dir={run_dir}"]
        command += [f"--num-nodes={num_nodes}", "--ranks-per-node=1", *QUICK, *words]
        ports = ports or [free_port()] * num_nodes
        self.drivers = []
        for node in range(num_nodes):
            output = folder / f"{run_dir.name}-{job}-{node}.txt"
            names = {"SLURM_NODEID": str(node), "SLURMD_NODENAME": f"n{node}", "SLURM_JOB_ID": job}
            names |= {"OMP_NUM_THREADS": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
            with output.open("a") as file:
                driver = subprocess.Popen(
                    [*command, f"--rendezvous=127.0.0.1:{ports[node]}"],
                    env={**os.environ, **names, **(environment or {})},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.drivers.append(driver)
            self.outputs.append(output)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        below = [p for driver in self.drivers for p in _below(driver.pid)]
        for process in below:
            process.kill()
        for driver in self.drivers:
            driver.kill()
            driver.wait()

    def agent(self, node: int) -> psutil.Process:
        """torchrun's agent on a node."""
        return psutil.Process(self.drivers[node].pid).children()[0]

    def rank(self, node: int) -> psutil.Process:
        """The rank on a node."""
        return self.agent(node).children()[0]

    def events(self, kind: str) -> list[dict]:
        """The events of a kind so far."""
        return [event for event in read_events(self.run_dir) if event["event"] == kind]

    def wait_for_steps(self, starts: int, steps: int = 4, timeout_s: float = 600) -> None:
        """Until ranks have started so many times, and then written so many rows."""
        self.wait_for(lambda: len(self.events("start")) >= starts, timeout_s)
        rows = self._rows()
        self.wait_for(lambda: self._rows() >= rows + steps, timeout_s)

    def wait_for(self, done: Callable[[], object], timeout_s: float = 600) -> None:
        """Until `done`, while all drivers run. Raises AssertionError otherwise."""
        deadline = time.monotonic() + timeout_s
        while not done():
            time.sleep(0.01)
            assert time.monotonic() < deadline, self.said()

    def finish(self, timeout_s: float = 600) -> list[int]:
        """The exit statuses of all drivers."""
        deadline = time.monotonic() + timeout_s
        try:
            return [d.wait(max(0.1, deadline - time.monotonic())) for d in self.drivers]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def said(self) -> str:
        """What the drivers and their ranks have printed."""
        return "\n".join(path.read_text()[-4000:] for path in self.outputs)

    def _rows(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now.

    Below those that connections get: one that waits for a server there might meet itself.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def kill(process: psutil.Process) -> None:
    """SIGKILL."""
    process.send_signal(signal.SIGKILL)
