"""`megascale doctor`: the arguments, and what is printed of the checks of this machine."""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megascale.commands.doctor_nodes import WITH_NODES, add_nodes_arguments, run_nodes
from megascale.errors import UserError
from megascale.installation import is_installed
from megascale.runtime import machine_checks as machine
from megascale.runtime import package_checks as packages
from megascale.runtime.machine_checks import FAIL, OK, WARN, Finding, examine


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
    for name, check in checks_of(folder):
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


def checks_of(folder: Path) -> list[tuple[str, Callable[[], Finding]]]:
    """All checks in order; those that import torch and change it for this device come last.

    Without torch, those of `TORCH_CHECKS` are left out.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", machine.check_python),
        ("packages", packages.check_packages),
        ("torch", packages.check_torch),
        (
            "megatron-core",
            lambda: packages.check_megatron_core(packages.version_of("megatron-core")),
        ),
        ("cores", machine.check_cores),
        ("memory", machine.check_memory),
        ("disk", lambda: machine.check_disk(folder)),
        ("folder", lambda: machine.check_folder(folder)),
        (
            "open files",
            lambda: machine.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        ),
        ("/dev/shm", lambda: machine.check_shared_memory(Path("/dev/shm"))),
        ("device", packages.check_device),
        ("backend", packages.check_backend),
        *[(name, lambda name=name: packages.check_optional(name)) for name in packages.OPTIONAL],
        ("apex", packages.check_apex),
        ("MPI", packages.check_mpi),
        ("matmul", packages.check_matmul),
        ("all-reduce", lambda: packages.check_all_reduce(packages.ALL_REDUCE_TIMEOUT_S)),
        ("megatron-core import", packages.check_megatron_import),
    ]
    has_torch = is_installed("torch")
    return [
        (name, check) for name, check in checks if has_torch or name not in packages.TORCH_CHECKS
    ]
