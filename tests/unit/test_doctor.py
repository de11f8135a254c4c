"""`megascale doctor`: each line can say ok, warn and FAIL, and the exit status follows."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megascale.commands import doctor
from megascale.errors import UserError
from megascale.runtime import machine_checks as machine
from megascale.runtime import package_checks as packages
from megascale.runtime.machine_checks import Finding


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_doctor_arguments(parser)
    return doctor.run_doctor(parser.parse_args(words))


def finding(status: str) -> Finding:
    return Finding(f"a {status} thing", status, "its state", "" if status == "ok" else "mend it")


def only(monkeypatch, *statuses: str) -> None:
    checks = [(status, lambda status=status: finding(status)) for status in statuses]
    monkeypatch.setattr(doctor, "checks_of", lambda folder: checks)


def test_the_whole_doctor_on_this_machine(tmp_path: Path, capsys) -> None:
    """In this process, but without what changes torch for a CPU run."""
    real = doctor.checks_of
    checks = [pair for pair in real(tmp_path) if pair[0] not in ("all-reduce",)]
    found = {name: machine.examine(name, check) for name, check in checks[:-1]}
    assert {each.status for each in found.values()} <= {"ok", "warn"}, capsys.readouterr()
    assert all(name == each.name for name, each in found.items())
    assert found["torch"].detail.startswith(torch.__version__)
    assert str(len(os.sched_getaffinity(0))) in found["cores"].detail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("statuses", "code"), [(["ok"], 0), (["ok", "warn"], 0), (["FAIL", "warn", "ok"], 2)]
)
def test_exit_status_and_text(monkeypatch, capsys, statuses, code) -> None:
    only(monkeypatch, *statuses)
    assert run() == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "thing" in line] == statuses
    assert sum("-> mend it" in line for line in lines) == len(statuses) - statuses.count("ok")
    assert lines[-1].startswith(f"{len(statuses)} checks: {statuses.count('FAIL')} FAIL")


def test_json_is_one_object_and_nothing_else(monkeypatch, capsys) -> None:
    only(monkeypatch, "ok", "FAIL")
    assert run("--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "FAIL"
    assert report["findings"][1] == {
        "name": "a FAIL thing", "status": "FAIL", "detail": "its state", "remedy": "mend it"
    }  # fmt: skip


def test_a_check_that_raises_is_a_fail_and_its_prints_stay_out_of_the_report(capsys) -> None:
    def broken() -> Finding:
        print("noise")
        raise ImportError("no\nsuch thing", name="torch")

    found = machine.examine("torch", broken)
    assert (found.status, found.detail) == ("FAIL", "ImportError: no such thing")
    assert "torch" in found.remedy
    assert capsys.readouterr().out == ""


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run("--folder", str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("version", "status"),
    [(None, "FAIL"), ("0.16.0", "FAIL"), ("0.16.1", "ok"), ("0.19.2rc1", "ok"), ("0.20.0", "FAIL"),
     ("1.0", "FAIL")],
)  # fmt: skip
def test_supported_megatron_core(version: str | None, status: str) -> None:
    found = packages.check_megatron_core(version)
    assert found.status == status
    assert (">=0.16.1,<0.20" in found.remedy) == (status == "FAIL")


def test_cores_of_a_container(monkeypatch) -> None:
    cores = len(os.sched_getaffinity(0))
    for limit, status in (("max 100000", "ok"), ("", "ok"), ("50000 100000", "warn")):
        monkeypatch.setattr(machine, "_cgroup", lambda name, limit=limit: limit)
        assert machine.check_cores().status == status
    assert "may use 0.5" in machine.check_cores().detail
    monkeypatch.setattr(machine, "_cgroup", lambda name: f"{(cores + 1) * 100000} 100000")
    assert machine.check_cores().status == "ok"


def test_memory_is_the_least_of_machine_and_container(monkeypatch) -> None:
    limits = {"memory.max": str(3 * machine.GIB), "memory.current": str(machine.GIB)}
    monkeypatch.setattr(machine, "_cgroup", limits.__getitem__)
    found = machine.check_memory()
    assert (found.status, found.detail) == ("warn", "2.0 GiB available of 3.0 GiB")


def test_disk_and_shared_memory_that_are_small(monkeypatch, tmp_path: Path) -> None:
    assert machine.check_shared_memory(tmp_path / "none").status == "warn"
    for free, status in ((64 * 2**20, "warn"), (100 * machine.GIB, "ok")):
        usage = SimpleNamespace(free=free, total=200 * machine.GIB)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder, usage=usage: usage)
        assert machine.check_disk(tmp_path).status == status
        assert machine.check_shared_memory(tmp_path).status == status


@pytest.mark.parametrize(("limit", "status"), [(1024, "warn"), (65536, "ok"), (-1, "ok")])
def test_open_files(limit: int, status: str) -> None:
    assert machine.check_open_files(limit).status == status


@pytest.mark.parametrize(
    ("speed", "status"), [((900.0, 0.001), "ok"), ((20.0, 0.001), "warn"), ((900.0, 0.3), "warn")]
)
def test_a_slow_folder_is_a_warning(monkeypatch, tmp_path: Path, speed, status: str) -> None:
    monkeypatch.setattr(machine, "_measure_writes", lambda folder: speed)
    assert machine.check_folder(tmp_path).status == status


def test_a_folder_that_takes_no_file_fails(monkeypatch, tmp_path: Path) -> None:
    def refuse(folder: Path) -> tuple[float, float]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "_measure_writes", refuse)
    found = machine.check_folder(tmp_path)
    assert found.status == "FAIL" and "Permission denied" in found.detail


def test_write_speed_counts_the_fsync(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "WRITE_BYTES", 2**20)
    monkeypatch.setattr(machine.os, "fsync", lambda descriptor: time.sleep(0.05))
    mb_per_s, fsync_s = machine._measure_writes(tmp_path)
    assert mb_per_s <= 2**20 / 1e6 / 0.05
    assert fsync_s >= 0.05


def make_package(folder: Path, name: str, *inner: str) -> None:
    for package in (name, *(f"{name}/{each}" for each in inner)):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')")


@pytest.mark.parametrize(
    ("inner", "extension", "status", "says"),
    [
        (["amp"], False, "warn", "unrelated"),
        (["multi_tensor_apply"], False, "warn", "without its extensions"),
        (["multi_tensor_apply"], True, "ok", "NVIDIA apex with its extensions"),
    ],
)
def test_which_apex_it_is(monkeypatch, tmp_path, inner, extension, status, says) -> None:
    make_package(tmp_path, "apex", *inner)
    if extension:
        make_package(tmp_path, "amp_C")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = packages.check_apex()
    assert found.status == status and says in found.detail
    assert ("github.com/NVIDIA/apex" in found.remedy) == (status == "warn")
    assert "apex" not in sys.modules


@pytest.mark.parametrize(("cuda", "status"), [(False, "ok"), (True, "warn")])
def test_optional_packages_are_missed_only_on_cuda(monkeypatch, cuda, status) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setattr(packages, "_has_cuda", lambda: cuda)
    found = [packages.check_optional(name) for name in packages.OPTIONAL] + [packages.check_apex()]
    assert {each.status for each in found} == {status}
    assert all("would give" in each.detail for each in found)
    assert all(bool(each.remedy) == cuda for each in found)


def test_mpi_needs_both_the_package_and_a_launcher(monkeypatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    monkeypatch.setattr(packages.shutil, "which", lambda name, path: None)
    assert packages.check_mpi().detail.startswith("no mpiexec")
    monkeypatch.setattr(packages.shutil, "which", lambda name, path: f"/opt/{name}")
    assert "/opt/mpiexec" in packages.check_mpi().detail
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert packages.check_mpi().detail.startswith("no mpi4py")


def test_a_device_that_multiplies_wrongly_fails(monkeypatch) -> None:
    assert packages.check_matmul().status == "ok"
    right = torch.Tensor.__matmul__

    def wrong(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(self, other)
        return product * (1 + 1e-3) if self.dtype == torch.float32 else product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    found = packages.check_matmul()
    assert found.status == "FAIL" and found.detail.startswith("fp32 on")


def end_with_3(rank: int, meeting_file: str) -> None:
    sys.exit(3)


def never_end(rank: int, meeting_file: str) -> None:
    time.sleep(600)


def test_two_ranks_meet() -> None:
    found = packages.check_all_reduce(timeout_s=60)
    assert found.status == "ok", found


@pytest.mark.parametrize(
    ("rank", "timeout_s", "says"), [(end_with_3, 60, "[3, 3]"), (never_end, 1, "no answer")]
)
def test_two_ranks_that_do_not_meet_fail(monkeypatch, rank, timeout_s, says) -> None:
    monkeypatch.setattr(packages, "_all_reduce_rank", rank)
    found = packages.check_all_reduce(timeout_s)  # `never_end` would outlast the limit of a test
    assert found.status == "FAIL" and says in found.detail and "GLOO_SOCKET_IFNAME" in found.remedy
