"""The acceptance on GPUs at tiny sizes on CPU: every part runs, so that no mistake waits for a GPU.

Packages that the machine with the GPU may lack cannot be imported in these runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = ("datasets", "pyarrow", "numba", "mpi4py", "highspy", "matplotlib", "transformers")
NEEDS_DEVICE = ("MFU", "over the estimate", "peak over the plan", "_gpu.py::")
"""Rows that have no value without a device."""
PARTS = """
import sys, gpu
for part in sys.argv[2:]:
    assert gpu.main(["--part", part, "--json", sys.argv[1], "--small"]) == 0
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process in which blocked packages raise ImportError."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in BLOCKED:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    path = [str(folder), str(ROOT), str(ROOT / "tools")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def run(environment, *words, status=0):
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        ("ceilings", "kernels", "pack", "ring", "tests"),
        ("waits", "mfu", "experts"),
        ("offload", "state"),
    ],
    ids=" ".join,
)
def test_every_part_runs_without_packages_that_are_not_needed(tmp_path, environment, parts):
    path = tmp_path / "gpu.json"
    run(environment, sys.executable, "-W", "ignore", "-c", PARTS, str(path), *parts)
    rows = rows_of(path)
    assert {row["part"] for row in rows} == set(parts)
    for row in rows:
        assert row["passed"] is not False, row
        if not any(words in row["what"] for words in NEEDS_DEVICE):
            assert isinstance(row["found"], int | float), row


def test_parts_are_all_listed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu

    (listed,) = test_every_part_runs_without_packages_that_are_not_needed.pytestmark[:1]
    assert {part for parts in listed.args[1] for part in parts} == set(gpu.PARTS)
    for part in gpu.PARTS:
        assert all(function.__doc__ for function in gpu.measures(part))


def test_a_part_that_runs_out_of_time_keeps_the_rows_of_others(tmp_path, environment):
    path, wheels = tmp_path / "gpu.json", tmp_path / "wheels"
    earlier = {"part": "copies", "what": "a copy", "found": 1.0, "unit": "", "least": None}
    earlier |= {"most": None, "passed": None}
    path.write_text(json.dumps({"machine": {}, "small": True, "rows": [earlier]}))
    words = ("bash", "tools/gpu.sh", "--python", sys.executable, "--small", "--json", str(path))
    words += ("--wheels", str(wheels), "--part", "ceilings")
    run(environment, *words)
    names = [row["what"] for row in rows_of(path)]
    assert names == ["a copy", "product of 64^3, bf16", "copy on the device"]
    printed = run({**environment, "PART_S": "1"}, *words, status=1)
    last = rows_of(path)[-1]
    assert last["what"] == "part ceilings runs to its end"
    assert (last["found"], last["passed"]) == ("out of time", False)
    assert rows_of(path)[0] == earlier and "out of time" in printed


@pytest.mark.slow
def test_several_ranks_run_every_part(tmp_path, environment):
    path = tmp_path / "gpus.json"
    words = ("bash", "tools/gpus.sh", "--python", sys.executable, "--ranks", "2")
    run(environment, *words, "--plans", "3", "--json", str(path))
    rows = rows_of(path)
    assert {row["part"] for row in rows} == {"plans", "bandwidth", "overlap", "layouts"}
    assert not [row for row in rows if row["passed"] is False]
    found = {row["what"]: row["found"] for row in rows}
    assert found["random plans that ended, each token once"] == 3
    assert found["experts, EP: relative difference of 3 losses"] < 1e-4
