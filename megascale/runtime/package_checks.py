"""What `megascale doctor` examines of packages: which are there, and whether torch works here."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from megascale.installation import NEEDED_BY_RANKS, install_command, is_installed, missing_packages
from megascale.runtime.machine_checks import FAIL, GIB, OK, WARN, Finding

MEGATRON_CORE = ((0, 16, 1), (0, 20))
"""First supported release, and the first that is not."""
ALL_REDUCE_TIMEOUT_S = 90.0
TORCH_CHECKS = ("device", "backend", "matmul", "all-reduce", "megatron-core import")
"""Which cannot be made without torch."""


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
        version = version_of(name.replace("_", "-")) or "unknown version"
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
    return Finding("MPI", OK, f"mpi4py {version_of('mpi4py')}, {launcher}: {gives}")


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


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
