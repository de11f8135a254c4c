"""An mlflow server that a test may stop, kill and start again; and what trackers have stored."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drive import free_port

BLOCK = 32768
"""Of a wandb file, which is a LevelDB log."""


class MlflowServer:
    """A server on this machine, with its database in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 180.0) -> None:
        """Start it, and wait until it answers."""
        words = f"--host 127.0.0.1 --port {self.port} --workers 1".split()
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        words += ["--default-artifact-root", str(self.folder / "artifacts")]
        with open(self.folder / "server.txt", "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "server.txt").read_text()[-3000:]
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the server."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it as a power failure would."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def trackio_rows(folder: Path) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """(step, values) of each run that trackio has stored in `folder`."""
    runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    with sqlite3.connect(folder / "megascale.db") as database:
        for run, step, values in database.execute(
            "select run_name || ' ' || run_id, step, metrics from metrics order by id"
        ):
            runs.setdefault(run, []).append((step, json.loads(values)))
    return runs


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        room = BLOCK - at % BLOCK
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record
