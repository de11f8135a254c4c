"""A limit of memory for a process of its own, to prove that work on large files is streamed."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REASON = "the limit is Linux's RLIMIT_DATA"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason=REASON)


def limit_memory(more_bytes: int) -> None:
    """Let this process take `more_bytes` more than now. Exits if the limit does not bind."""
    import torch

    lines = Path("/proc/self/status").read_text().splitlines()
    used_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
    limit = used_kb * 1024 + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        torch.zeros(more_bytes)
    except (RuntimeError, MemoryError):
        return
    sys.exit("the limit does not bind")


def run_python(code: str, *arguments: Any) -> str:
    """What `code` prints in a process of its own, with the modules of this one; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return done.stdout
