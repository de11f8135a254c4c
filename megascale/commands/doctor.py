"""`megascale doctor`: what this machine has, what is wrong with it, and what would mend it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from megascale.commands.nodes import WITH_NODES, add_nodes_arguments, run_nodes
from megascale.errors import UserError
from megascale.installation import (
    NEEDED_BY_RANKS,
    install_command,
    is_installed,
    missing_packages,
)

OK, WARN, FAIL = "ok", "warn", "FAIL"
GIB = 2**30
MEGATRON_CORE = ((0, 16, 1), (0, 20))
"""First supported release, and the first that is not."""
MIN_MEMORY = 4 * GIB
MIN_DISK = 10 * GIB
MIN_SHM = 1 * GIB
MIN_OPEN_FILES = 4096
MIN_WRITE_MB_PER_S = 50.0
MAX_FSYNC_S = 0.1
WRITE_BYTES = 64 * 2**20
ALL_REDUCE_TIMEOUT_S = 90.0
TORCH_CHECKS = ("device", "backend", "matmul", "all-reduce", "megatron-core import")
"""Which cannot be made without torch."""


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


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--folder", metavar="DIR", help="folder to test for runs; default: this one"
    )
    add_nodes_arguments(parser)


def run_doctor(args: argparse.Namespace) -> int:
    """Examine the machine and print what is found; 0 when nothing FAILs, else 2.

    With `--nodes` it is the ranks of a job that are examined, see `runtime.nodes`.
    Raises UserError when the folder to test does not exist, and for options that do not go
    together.
    """
    if args.nodes:
        if args.folder is not None:
            raise UserError("--folder is tested without --nodes")
        return run_nodes(args)
    alone = [name for name in WITH_NODES if getattr(args, name) is not None]
    if alone:
        raise UserError(f"--{alone[0].replace('_', '-')} goes with --nodes")
    folder, findings = Path(args.folder or "."), []
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    for name, check in _checks(folder):
        finding = examine(name, check)
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    worst = max((finding.status for finding in findings), key=[OK, WARN, FAIL].index)
    if args.json:
        print(json.dumps({"status": worst, "findings": [asdict(each) for each in findings]}))
    else:
        count = sum(finding.status == FAIL for finding in findings)
        warned = sum(finding.status == WARN for finding in findings)
        print(f"\n{len(findings)} checks: {count} FAIL, {warned} warn")
    return 2 if worst == FAIL else 0


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


def _checks(folder: Path) -> list[tuple[str, Callable[[], Finding]]]:
    """All checks in order; those that import torch and change it for this device come last.

    Without torch, those of `TORCH_CHECKS` are left out.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("torch", check_torch),
        ("megatron-core", lambda: check_megatron_core(_version("megatron-core"))),
        ("cores", check_cores),
        ("memory", check_memory),
        ("disk", lambda: check_disk(folder)),
        ("folder", lambda: check_folder(folder)),
        ("open files", lambda: check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])),
        ("/dev/shm", lambda: check_shared_memory(Path("/dev/shm"))),
        ("device", check_device),
        ("backend", check_backend),
        *[(name, lambda name=name: check_optional(name)) for name in OPTIONAL],
        ("apex", check_apex),
        ("MPI", check_mpi),
        ("matmul", check_matmul),
        ("all-reduce", lambda: check_all_reduce(ALL_REDUCE_TIMEOUT_S)),
        ("megatron-core import", check_megatron_import),
    ]
    has_torch = is_installed("torch")
    return [(name, check) for name, check in checks if has_torch or name not in TORCH_CHECKS]


def check_python() -> Finding:
    """Which Python this is; an older one than 3.11 cannot import megascale."""
    return Finding("python", OK, f"{platform.python_version()} ({sys.executable})")


def check_packages() -> Finding:
    """What every verb needs, and what training needs beside torch and megatron-core."""
    missing = missing_packages("")
    if missing:
        return Finding("packages", FAIL, f"missing: {', '.join(missing)}", install_command(""))
    missing = [*missing_packages("data"), *missing_packages("train")]
    missing = [name for name in missing if name not in NEEDED_BY_RANKS]  # these have own lines
    if missing:
        detail = f"not installed, as some corpora, tokenizers and runs need: {', '.join(missing)}"
        return Finding("packages", WARN, detail, install_command("train"))
    return Finding("packages", OK, "all that training and corpora need")


def check_torch() -> Finding:
    """torch is installed, and imports."""
    if not is_installed("torch"):
        detail = f"not installed, as training needs; not examined: {', '.join(TORCH_CHECKS)}"
        return Finding("torch", FAIL, detail, install_command("train"))
    import torch

    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
    return Finding("torch", OK, f"{torch.__version__}, {cuda}")


def check_megatron_core(version: str | None) -> Finding:
    """megatron-core in a release that megascale is tested with."""
    first, beyond = MEGATRON_CORE
    supported = f">={'.'.join(map(str, first))},<{'.'.join(map(str, beyond))}"
    remedy = f"pip install 'megatron-core{supported}'"
    if version is None:
        return Finding("megatron-core", FAIL, "not installed", remedy)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not first <= numbers < beyond:
        return Finding("megatron-core", FAIL, f"{version} is not supported", remedy)
    return Finding("megatron-core", OK, f"{version}, supported ({supported})")


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


def check_device() -> Finding:
    """The device a run with `device: auto` takes, and why."""
    import torch

    from megascale.runtime.distributed import choose_device

    kind, why = choose_device("auto")
    if kind == "cpu" and torch.version.cuda and shutil.which("nvidia-smi"):
        remedy = "compare nvidia-smi with torch's CUDA version; the driver may be too old"
        return Finding("device", WARN, f"cpu: {why}, though a driver is installed", remedy)
    if kind == "cpu":
        return Finding("device", OK, f"cpu: {why}")
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / GIB:.0f} GiB"
    return Finding("device", OK, f"cuda: {why}; {properties.name}, {memory}")


def check_backend() -> Finding:
    """The collective library that fits the device."""
    import torch
    import torch.distributed as dist

    wanted = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_available() or not dist.is_backend_available(wanted):
        return Finding("backend", FAIL, f"torch lacks {wanted}", "install the official torch wheel")
    version = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if wanted == "nccl" else ""
    return Finding("backend", OK, f"{wanted}{version} between the ranks of a run")


OPTIONAL = {
    "transformer_engine": (
        "fused layers and FP8 on NVIDIA GPUs",
        "pip install --no-build-isolation 'transformer-engine[pytorch]'",
    ),
    "flash_attn": (
        "a faster attention kernel on NVIDIA GPUs",
        "pip install --no-build-isolation flash-attn",
    ),
    "triton": ("torch.compile and fused kernels on GPUs", "pip install triton"),
}
"""Module name to (what it gives, how to get it)."""


def check_optional(name: str) -> Finding:
    """A package that megatron-core uses when it is there."""
    gives, remedy = OPTIONAL[name]
    if find_spec(name) is not None:
        version = _version(name.replace("_", "-")) or "unknown version"
        return Finding(name, OK, f"{version}: {gives}")
    if _has_cuda():
        return Finding(name, WARN, f"not installed; would give {gives}", remedy)
    return Finding(name, OK, f"not installed, not needed here; would give {gives}")


def check_apex() -> Finding:
    """NVIDIA apex, which is not the package that the index calls apex."""
    gives = "fused optimizers and norms on NVIDIA GPUs"
    build = "build it from its source, github.com/NVIDIA/apex, with the C++ and CUDA extensions"
    spec = find_spec("apex")
    if spec is None:
        if _has_cuda():
            return Finding("apex", WARN, f"not installed; would give {gives}", build)
        return Finding("apex", OK, f"not installed, not needed here; would give {gives}")
    folders = spec.submodule_search_locations or []
    if not any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders):
        detail = "the installed 'apex' is an unrelated package of that name, not NVIDIA's"
        return Finding("apex", WARN, detail, f"pip uninstall apex; {build}")
    if find_spec("amp_C") is None:
        return Finding("apex", WARN, "NVIDIA apex, built without its extensions", build)
    return Finding("apex", OK, f"NVIDIA apex with its extensions: {gives}")


def check_mpi() -> Finding:
    """mpi4py and a launcher, on the PATH or beside this Python."""
    gives = "'mpiexec -n N megascale prepare', a corpus made on several machines at once"
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    launcher = shutil.which("mpiexec", path=places)
    missing = "no mpiexec" if launcher is None else "no mpi4py"
    if launcher is None or find_spec("mpi4py") is None:
        return Finding("MPI", OK, f"{missing}, not needed on one machine; would give {gives}")
    return Finding("MPI", OK, f"mpi4py {_version('mpi4py')}, {launcher}: {gives}")


def check_matmul() -> Finding:
    """Products in fp32 and bf16 against the same in float64 on the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    worst = {}
    for name, dtype, allowed in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 1e-2)):
        a, b = left.to(dtype), right.to(dtype)
        exact = a.double() @ b.double()
        product = (a.to(device) @ b.to(device)).cpu().double()
        worst[name] = float((product - exact).abs().max() / exact.abs().max())
        if not worst[name] <= allowed:
            detail = f"{name} on {device} is off by {worst[name]:.1e} of the largest entry"
            remedy = "unset TF32 overrides; else the device or its torch build is faulty"
            return Finding("matmul", FAIL, detail, remedy)
    shown = ", ".join(f"{name} within {error:.0e}" for name, error in worst.items())
    return Finding("matmul", OK, f"{shown} of float64, on {device}")


def check_all_reduce(timeout_s: float) -> Finding:
    """Two processes of this machine add a number over gloo."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_all_reduce_rank, args=(rank, f"{folder}/meet"), daemon=True)
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(max(0.0, timeout_s - (time.perf_counter() - begin)))
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
    remedy = "set GLOO_SOCKET_IFNAME=lo, and look for a firewall between local processes"
    if None in codes:
        return Finding("all-reduce", FAIL, f"no answer within {timeout_s:.0f} s", remedy)
    if codes != [0, 0]:
        return Finding("all-reduce", FAIL, f"two ranks ended with exit codes {codes}", remedy)
    seconds = time.perf_counter() - begin
    return Finding("all-reduce", OK, f"two gloo ranks started and agreed in {seconds:.1f} s")


def _all_reduce_rank(rank: int, meeting_file: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=2)
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    dist.destroy_process_group()
    sys.exit(0 if value.item() == 3.0 else 3)


def check_megatron_import() -> Finding:
    """megatron-core imports on this device, in the way a run imports it."""
    from megascale.runtime.distributed import prepare_device

    begin = time.perf_counter()
    kind, _ = prepare_device("auto")
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.parallel_state  # noqa: F401

    seconds = time.perf_counter() - begin
    return Finding("megatron-core import", OK, f"ready on {kind} in {seconds:.1f} s")


def _has_cuda() -> bool:
    if not is_installed("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cgroup(name: str) -> str:
    """A limit that a container sets (cgroup v2); empty where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii")
    except OSError:
        return ""
