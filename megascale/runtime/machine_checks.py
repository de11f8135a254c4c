"""What `megascale doctor` examines of a machine: cores, memory, disks, limits."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OK, WARN, FAIL = "ok", "warn", "FAIL"
GIB = 2**30
MIN_MEMORY = 4 * GIB
MIN_DISK = 10 * GIB
MIN_SHM = 1 * GIB
MIN_OPEN_FILES = 4096
MIN_WRITE_MB_PER_S = 50.0
MAX_FSYNC_S = 0.1
WRITE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    status: str
    """ok, warn or FAIL."""
    detail: str
    remedy: str = ""
    """What would mend it; empty when there is nothing to mend."""

    def __str__(self) -> str:
        line = f"{self.status:<5} {self.name:<19} {self.detail}"
        return f"{line}\n{'':<26}-> {self.remedy}" if self.remedy else line


def examine(name: str, check: Callable[[], Finding]) -> Finding:
    """What `check` finds; a check that raises has found a fault. Its own prints go to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return check()
    except Exception as error:  # a doctor reports whatever it meets
        reason = " ".join(str(error).split())[:300]
        return Finding(name, FAIL, f"{type(error).__name__}: {reason}", _reinstall(error))


def _reinstall(error: Exception) -> str:
    if isinstance(error, ImportError) and error.name:
        return f"pip install --force-reinstall the package of '{error.name}'"
    return "install megascale with its requirements in a fresh environment"


def check_python() -> Finding:
    """Which Python this is; an older one than 3.11 cannot import megascale."""
    return Finding("python", OK, f"{platform.python_version()} ({sys.executable})")


def check_cores() -> Finding:
    """Cores this process may use, and a container's limit on them."""
    cores = len(os.sched_getaffinity(0))
    quota, period = [*_cgroup("cpu.max").split(), "max", "1"][:2]
    if quota == "max":
        return Finding("cores", OK, f"{cores}")
    allowed = int(quota) / int(period)
    detail = f"{cores}, of which the container may use {allowed:.1f} at a time"
    if allowed < cores:
        return Finding("cores", WARN, detail, f"set train.threads to {max(1, int(allowed))}")
    return Finding("cores", OK, detail)


def check_memory() -> Finding:
    """Memory that is free, within a container's limit."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _cgroup("memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        used = int(_cgroup("memory.current").strip() or 0)
        available = min(available, total - used)
    detail = f"{available / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    if available < MIN_MEMORY:
        return Finding("memory", WARN, detail, "close other programs, or train a smaller model")
    return Finding("memory", OK, detail)


def check_disk(folder: Path) -> Finding:
    """Room for corpora and checkpoints."""
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB in {folder.resolve()}"
    if usage.free < MIN_DISK:
        return Finding("disk", WARN, detail, "free some space, or set run_dir to a larger disk")
    return Finding("disk", OK, detail)


def check_folder(folder: Path) -> Finding:
    """How fast the folder takes a checkpoint, and how long one fsync lasts."""
    try:
        mb_per_s, fsync_s = _measure_writes(folder)
    except OSError as error:
        remedy = "go to a folder you may write in, or name one with --folder"
        return Finding("folder", FAIL, f"{folder.resolve()}: {error.strerror}", remedy)
    detail = f"writes {mb_per_s:,.0f} MB/s to the disk, one fsync takes {1000 * fsync_s:.1f} ms"
    if mb_per_s < MIN_WRITE_MB_PER_S or fsync_s > MAX_FSYNC_S:
        return Finding("folder", WARN, detail, "slow: put run_dir on a local or a parallel disk")
    return Finding("folder", OK, detail)


def _measure_writes(folder: Path) -> tuple[float, float]:
    """(MB/s of one large file with its fsync, median seconds of a small write with fsync)."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        begin = time.perf_counter()
        for _ in range(WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        whole_s = time.perf_counter() - begin
        fsyncs = []
        for _ in range(5):
            begin = time.perf_counter()
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            fsyncs.append(time.perf_counter() - begin)
    return WRITE_BYTES / 1e6 / whole_s, statistics.median(fsyncs)


def check_open_files(soft_limit: int) -> Finding:
    """Sockets of the ranks and shards of the corpora all count as open files."""
    if soft_limit == resource.RLIM_INFINITY:
        return Finding("open files", OK, "no limit")
    if soft_limit < MIN_OPEN_FILES:
        detail = f"at most {soft_limit} per process"
        return Finding("open files", WARN, detail, "ulimit -n 65536 before starting many ranks")
    return Finding("open files", OK, f"at most {soft_limit:,} per process")


def check_shared_memory(folder: Path) -> Finding:
    """NCCL and worker processes share memory through it."""
    if not folder.is_dir():
        return Finding("/dev/shm", WARN, "missing", "mount a tmpfs on /dev/shm")
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free"
    if free < MIN_SHM:
        return Finding("/dev/shm", WARN, detail, "in a container: start it with --shm-size=8g")
    return Finding("/dev/shm", OK, detail)


def _cgroup(name: str) -> str:
    """A limit that a container sets (cgroup v2); empty where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii")
    except OSError:
        return ""
