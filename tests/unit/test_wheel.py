"""The wheel, installed outside of the checkout beside the packages of no extra: what works there.

The environment has links to the packages that the wheel's own metadata asks for, and no others, so
nothing is downloaded and torch is not there.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import megascale
from megascale.installation import MODULES

ROOT = Path(__file__).parents[2]
SOURCES = ("megascale", "configs", "data", "slurm", "pyproject.toml", "README.md", "LICENSE")
RUN = ROOT / "tests/data/run_642fa59.tar.xz"
LEFT_OUT = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since a build leaves its folders in what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, source)
    pip("wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(out))
    (built,) = out.iterdir()
    return built


def pip(*words: str) -> None:
    alone = ("--disable-pip-version-check", "--no-index", "--quiet")
    command = [sys.executable, "-m", "pip", *words, *alone]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def needed(requirements) -> set[str]:
    """The distributions that these ask for, and those that they ask for, without extras."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        asked = Requirement(waiting.pop())
        if asked.name not in found and (not asked.marker or asked.marker.evaluate({"extra": ""})):
            found.add(asked.name)
            waiting += metadata.distribution(asked.name).requires or []
    return found


class Installed:
    """An environment with the wheel, and a folder outside of the checkout to work in."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        venv.create(folder / "venv", symlinks=True)
        self.bin = folder / "venv/bin"
        pip("--python", str(self.bin / "python"), "install", "--no-deps", str(wheel))
        (self.packages,) = (folder / "venv").glob("lib/python*/site-packages")
        (facts,) = self.packages.glob("megascale-*.dist-info/METADATA")
        for name in needed(metadata.PathDistribution(facts.parent).requires or []):
            self._link(metadata.distribution(name))

    def _link(self, distribution: metadata.Distribution) -> None:
        for top in {file.parts[0] for file in distribution.files or []}:
            if top not in ("..", "__pycache__") and not (self.packages / top).exists():
                (self.packages / top).symlink_to(Path(str(distribution.locate_file(top))))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home)}
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.run(
            words, cwd=self.home, env=environment, capture_output=True, text=True, timeout=300
        )

    def says(self, *words: str, status: int = 0) -> str:
        """What `megascale WORDS` prints, on stderr where it fails."""
        done = self.run(str(self.bin / "megascale"), *words)
        assert done.returncode == status, done.stdout[-1000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stdout + done.stderr
        return done.stderr if status else done.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    made = Installed(wheel, tmp_path_factory.mktemp("installed"))
    with tarfile.open(RUN) as archive:
        archive.extractall(made.home, filter="data")
    return made


def test_the_wheel_holds_the_code_and_what_verbs_need(wheel):
    """Every file of the code, the examples, the batch scripts, and nothing else."""
    assert wheel.name.startswith(f"megascale-{megascale.__version__}-")
    names = {name for name in ZipFile(wheel).namelist() if name.startswith("megascale/")}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "megascale").rglob("*.py")}
    folders = {"configs": "**/*.yaml", "data": "*.yaml", "slurm": "*.sbatch"}
    shipped = {
        f"megascale/bundled/{path.relative_to(ROOT)}"
        for folder, pattern in folders.items()
        for path in (ROOT / folder).glob(pattern)
    }
    shipped |= {f"megascale/bundled/configs/{path.name}" for path in ROOT.glob("configs/*.json")}
    assert names == code | shipped | {"megascale/py.typed"}
    assert "megascale/bundled/slurm/train.sbatch" in names


def test_the_code_is_that_of_the_wheel_and_torch_is_not_there(installed):
    script = "import megascale; print(megascale.__file__); import torch"
    done = installed.run(str(installed.bin / "python"), "-c", script)
    assert done.stdout.strip() == str(installed.packages / "megascale/__init__.py")
    assert "No module named 'torch'" in done.stderr
    assert installed.says("--version") == f"megascale {megascale.__version__}\n"


def test_lengths_are_planned_and_clusters_simulated(installed):
    (installed.home / "lengths.txt").write_text("\n".join(map(str, range(100, 3000, 50))))
    lengths = ("--lengths", "lengths.txt", "--ranks", "4", "--capacity", "4096")
    said = installed.says("plan", *lengths, "--gantt", "plan.png")
    assert said.startswith("58 sequences of 88,450 tokens on 4 ranks")
    assert (installed.home / "plan.png").stat().st_size > 1000
    small = ("--ranks", "64", "--context", "64Ki", "--batch-tokens", "1Mi", "--steps", "1")
    assert "x bound" in installed.says("simulate", *small)
    law = installed.says("hparams", "steplaw", "--params", "1B", "--tokens", "100B")
    assert "optim.lr                  0.001632" in law


def test_examples_become_a_plan_and_jobs(installed):
    """As in the quickstart: names of the checkout, in a folder that has none of them."""
    assert "verdict: good" in installed.says("data", "check", "corpora/corpus")
    (installed.home / "corpora/python_stdlib").symlink_to("corpus")
    example = installed.packages / "megascale/bundled/configs/quickstart.yaml"
    done = installed.run(
        str(installed.bin / "megascale"), "plan", "configs/quickstart.yaml", "--ranks", "2"
    )
    assert done.returncode == 0, done.stderr
    line = f"megascale: configs/quickstart.yaml is not here; {example} is taken\n"
    assert done.stderr == line
    assert "runs/quickstart/metrics.jsonl" in done.stdout
    job = installed.says("submit", "configs/quickstart.yaml", "--nodes", "2", "--dry-run")
    assert "set -- configs/quickstart.yaml" in job and "python3 -m megascale launch" in job
    recipe = ("submit", "data/python_stdlib.yaml", "--job", "prepare", "--dry-run")
    assert "set -- data/python_stdlib.yaml" in installed.says(*recipe)
    recipe = ("plan", "configs/recipes/dense_1b.yaml", "--ranks", "8", "--device", "h100")
    assert "memory on h100          fits" in installed.says(*recipe, "--lengths", "web")
    (installed.home / "sweep").write_text("optim.lr=1e-3\noptim.lr=2e-3\n")
    sweep = ("submit", str(example), "--sweep", "sweep", "--dry-run")
    script = installed.packages / "megascale/bundled/slurm/train.sbatch"
    assert f"export MEGASCALE_TRAIN_SCRIPT={script}\n" in installed.says(*sweep)


def test_a_run_is_shown(installed):
    assert "run: done" in installed.says("status", "run")
    installed.says("plot", "run")
    assert (installed.home / "run/plots/loss.png").stat().st_size > 1000
    assert installed.says("report", "run") == "wrote run/report.html\n"
    assert installed.says("checkpoint", "verify", "run").count(": good") == 2
    assert "latest" in installed.says("checkpoint", "list", "run")
    assert "<-- this one" in installed.says("lineage", "run")


@pytest.mark.parametrize(
    "words",
    [
        ("train", "config.yaml", "run_dir=new"),
        ("train", "config.yaml", "run_dir=new", "--ranks", "2"),
        ("launch", "config.yaml", "run_dir=new", "--ranks-per-node", "2"),
        ("eval", "run", "--tasks", "arc_easy"),
    ],
    ids=lambda words: " ".join(words[:1] + words[3:4]),
)
def test_verbs_that_need_torch_say_what_to_install(installed, wheel, words):
    said = installed.says(*words, status=2)
    assert said.count("\n") == 1 and "torch, not installed here" in said
    assert said.endswith(f": pip install '{wheel}[train]'\n")
    assert not (installed.home / "new").exists()


def test_verbs_that_read_text_say_what_to_install(installed, wheel):
    said = installed.says("prepare", "corpus.yaml", "--out", "new", status=2)
    package, _, remedy = said.removeprefix("megascale: prepare needs ").partition(", ")
    assert package in MODULES["data"]
    assert remedy == f"not installed here: pip install '{wheel}[data]'\n"


def test_the_doctor_says_what_is_missing(installed, wheel):
    done = installed.run(str(installed.bin / "megascale"), "doctor")
    assert done.returncode == 2 and done.stderr == ""
    lines = done.stdout.splitlines()
    failed = [line.split()[1] for line in lines if line.startswith("FAIL")]
    assert failed == ["torch", "megatron-core"]
    assert lines.count(f"{'':<26}-> pip install '{wheel}[train]'") >= 2
    assert "datasets, mpi4py, numba" in done.stdout


def test_nothing_of_the_checkout_was_used(installed):
    """The environment of these tests must not help: neither its variables nor its folder."""
    assert "PYTHONPATH" not in installed.run("/usr/bin/env").stdout
    assert not installed.home.is_relative_to(ROOT) and os.path.commonpath([ROOT, installed.bin])
