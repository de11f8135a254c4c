"""What `pyproject.toml` promises, what a verb says without its packages, and named examples."""

import json
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megascale import __version__, cli, installation
from megascale.config import load_config
from megascale.corpus.recipe import load_recipe
from megascale.errors import UserError
from megascale.installation import MODULES, PACKAGE_OF, complaint_about, install_command
from megascale.launch.slurm import script_path
from megascale.run import preflight

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty working directory; examples are announced anew."""
    monkeypatch.chdir(tmp_path)
    installation._announce.cache_clear()
    return tmp_path


def installed_elsewhere(monkeypatch, folder: Path, facts: str | None) -> None:
    """As if the code lay in a `site-packages`, and pip had written these facts about it."""
    code = folder / "site-packages/megascale/installation.py"
    monkeypatch.setattr(installation, "__file__", str(code))

    class Distribution:
        def read_text(self, name):
            assert name == "direct_url.json"
            return facts

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())


def without(monkeypatch, *modules: str) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in {module.partition(".")[0] for module in modules}:
            monkeypatch.setitem(sys.modules, name, None)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_every_package_is_listed():
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "megascale").rglob("__init__.py")
    }
    holding_code = {path.parent for path in (ROOT / "megascale").rglob("*.py")}
    assert len(packages) == len(holding_code), "a folder of code has no __init__.py"
    folders = ("configs", "configs.recipes", "data", "slurm")
    shipped = {f"megascale.bundled.{name}" for name in folders}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages | shipped)
    for name in shipped:
        folder = ROOT / PROJECT["tool"]["setuptools"]["package-dir"][name]
        patterns = PROJECT["tool"]["setuptools"]["package-data"][name]
        kept = {path for pattern in patterns for path in folder.glob(pattern)}
        here = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"}
        assert kept == here and kept


def test_the_table_of_modules_is_what_each_extra_installs():
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {"": PROJECT["project"]["dependencies"], **extras}
    for extra, modules in MODULES.items():
        names = {Requirement(text).name for text in declared[extra]} - {"megascale"}
        assert names == {PACKAGE_OF.get(module, module) for module in modules}


def test_extras_include_those_below_them():
    extras = PROJECT["project"]["optional-dependencies"]

    def reached(extra):
        own = [Requirement(text) for text in extras[extra]]
        inner = {name for one in own if one.name == "megascale" for name in one.extras}
        return inner | {name for each in inner for name in reached(each)}

    assert reached("train") == {"data"}
    assert reached("eval") == reached("trackers") == {"train", "data"}
    assert reached("test") == {"train", "data", "eval", "trackers"}


def test_the_version_has_one_source():
    """A wheel takes it from the code too (`test_wheel.py`)."""
    assert "version" not in PROJECT["project"]
    source = PROJECT["tool"]["setuptools"]["dynamic"]["version"]
    assert source == {"attr": "megascale.__version__"}
    first = next(
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line[:3] == "## "
    )
    assert first.split()[1].rstrip(",") == cli.__version__


def test_what_is_missing_is_installed_from_where_this_code_came(monkeypatch, tmp_path):
    """The package is on no index, so no command has its bare name."""
    assert install_command("eval") == f"pip install -e '{ROOT}[eval]'"
    assert install_command("") == f"pip install -e {ROOT}"
    for facts, command in [
        (None, "in the checkout of megascale: pip install -e '.[eval]'"),
        ("damaged", "in the checkout of megascale: pip install -e '.[eval]'"),
        (
            json.dumps({"url": "file:///a%20b/megascale-1-py3-none-any.whl", "archive_info": {}}),
            "pip install '/a b/megascale-1-py3-none-any.whl[eval]'",
        ),
        (json.dumps({"url": "file:///src/it", "dir_info": {}}), "pip install '/src/it[eval]'"),
        (
            json.dumps({"url": "https://host/it.git", "vcs_info": {"vcs": "git"}}),
            "pip install 'megascale[eval] @ git+https://host/it.git'",
        ),
    ]:
        installed_elsewhere(monkeypatch, tmp_path, facts)
        assert install_command("eval") == command

    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", unknown)
    assert install_command("data") == "in the checkout of megascale: pip install -e '.[data]'"


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("torch", "torch", "train"),
        ("megatron.core", "megatron-core", "train"),
        ("tokenizers", "tokenizers", "data"),
        ("lm_eval", "lm-eval", "eval"),
    ],
)
def test_a_verb_without_its_package_says_so_in_one_line(
    monkeypatch, capsys, module, package, extra
):
    without(monkeypatch, module)

    class Provider:
        add_doctor_arguments = staticmethod(lambda parser: None)

        @staticmethod
        def run_doctor(args):
            __import__(f"{module}.inner")

    monkeypatch.setattr(cli, "import_module", lambda name: Provider)
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"megascale: doctor needs {package}, not installed here: pip install -e '{ROOT}[{extra}]'\n"
    )


@pytest.mark.parametrize(
    "name", ["megascale.nothing", "torch.nothing", "unheard_of", "megatron.core.nothing", None]
)
def test_a_fault_stays_a_traceback(monkeypatch, name):
    """A module that lacks in our code, or in a package that is installed."""
    error = ModuleNotFoundError("no such module", name=name)
    assert complaint_about(error, "train") is None

    def fail(verb, words):
        raise error

    monkeypatch.setattr(cli, "_run_provider", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_ranks_are_not_started_without_their_packages(monkeypatch):
    without(monkeypatch, "torch", "megatron.core")
    config = load_config(ROOT / "configs/quickstart.yaml")
    with pytest.raises(UserError, match=r"training needs megatron-core and torch, not installed"):
        preflight.check_ranks(config, 2)


def test_batch_scripts_are_found():
    for name in ("train", "sweep", "prepare"):
        assert script_path(name) == ROOT / "slurm" / f"{name}.sbatch"
        assert script_path(name).is_file()


def test_an_example_is_found_from_any_folder(elsewhere, capsys):
    example = ROOT / "configs/quickstart.yaml"
    config = load_config("configs/quickstart.yaml", ["train.tokens=7"])
    assert config == load_config(example, ["train.tokens=7"])
    line = f"megascale: configs/quickstart.yaml is not here; {example} is taken\n"
    assert capsys.readouterr().err == line
    load_config("configs/quickstart.yaml")
    assert capsys.readouterr().err == "", "said once"
    assert load_recipe("data/python_stdlib.yaml").name == "python_stdlib"
    assert "data/python_stdlib.yaml is not here" in capsys.readouterr().err


def test_a_file_of_the_working_directory_comes_first(elsewhere, capsys):
    (elsewhere / "configs").mkdir()
    own = elsewhere / "configs/quickstart.yaml"
    own.write_text("run_dir: runs/own\n")
    assert load_config("configs/quickstart.yaml").run_dir == "runs/own"
    own.unlink()
    own.symlink_to("gone.yaml")
    with pytest.raises(UserError, match="No such file"):
        load_config("configs/quickstart.yaml")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "path",
    ["quickstart.yaml", "configs/none.yaml", "configs/results", "data/../configs/quickstart.yaml",
     "configs", "slurm/train.sbatch", "/configs/quickstart.yaml", ""],
)  # fmt: skip
def test_nothing_else_is_taken_for_an_example(elsewhere, capsys, path):
    with pytest.raises(UserError, match="e.g. configs/quickstart.yaml|No such file|directory"):
        load_config(path)
    assert capsys.readouterr().err == ""


def test_only_the_first_rank_says_what_is_taken(elsewhere, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_config("configs/quickstart.yaml")
    assert capsys.readouterr().err == ""


def test_prepare_under_mpi_says_what_to_install(monkeypatch, capsys):
    """Before anything is read, and on one rank alone."""
    without(monkeypatch, "mpi4py")
    monkeypatch.setenv("PMI_SIZE", "2")
    for rank, said in (
        (
            "0",
            f"megascale: started by MPI, but mpi4py is not installed; {install_command('data')}\n",
        ),
        ("1", ""),
    ):
        monkeypatch.setenv("PMI_RANK", rank)
        assert cli.main(["prepare", "data/python_stdlib.yaml"]) == 2
        assert capsys.readouterr().err == said


def test_versions_are_those_of_the_code_and_of_what_ranks_need() -> None:
    found = installation.versions()
    assert found["megascale"].split()[0] == __version__
    for name in ("torch", "megatron-core"):
        assert found[name] == metadata.version(name)


def test_a_checkout_says_its_commit_and_whether_files_differ(tmp_path, monkeypatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    module = tmp_path / "checkout" / "megascale" / "installation.py"
    module.parent.mkdir(parents=True)
    module.write_text("here = 1\n")

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *who, "-C", str(tmp_path / "checkout"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(installation, "__file__", str(module))
    assert installation._commit() == ""  # no checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "v9")
    commit = git("rev-parse", "--short=10", "HEAD")
    assert installation._commit() == f"at commit {commit}"
    module.write_text("here = 2\n")
    assert installation._commit() == f"at commit {commit} changed"
    # an install inside somebody else's repository is no checkout of this code
    inner = module.parent / "site-packages" / "megascale" / "installation.py"
    monkeypatch.setattr(installation, "__file__", str(inner))
    assert installation._commit() == ""
    monkeypatch.setattr(installation, "__file__", str(module))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installation._commit() == ""  # no git
