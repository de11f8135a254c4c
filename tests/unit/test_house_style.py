"""The rules of the house that a machine can check."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megascale"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    "errors arrays reading installation exports parsing config runtime planner infowindow corpus "
    "fused mesh model optim devices checkpoint convert growth simulate monitor run training launch "
    "api commands cli"
).split()


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_functions_are_short():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in functions(ast.parse(path.read_text()))
    )
    assert lengths[-1] <= 100
    assert lengths[int(len(lengths) * 0.95)] <= 60
    assert lengths[len(lengths) // 2] <= 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_is_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for parent in [tree, *classes]:
        for node in parent.body:
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if named and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name}, line {node.lineno}"


def test_every_option_is_documented():
    tree = ast.parse((PACKAGE / "config/schema.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) > 10
    for node in classes:
        for field, after in zip(node.body, [*node.body[1:], None]):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{field.target.id}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_from_those_above_it(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "megascale" and len(parts) > 1:
                assert ORDER.index(parts[1]) <= ORDER.index(own), f"line {node.lineno}: {name}"


EXPORTING = ("corpus", "mesh", "model")


@pytest.mark.parametrize("package", ["megascale", *map("megascale.{}".format, EXPORTING)])
def test_an_exported_name_is_no_module(package):
    """Importing a module sets its name in the package, in the place of an exported function."""
    exported = importlib.import_module(package)
    folder = Path(exported.__path__[0])
    for name in exported.__all__:
        assert not (folder / name).exists() and not (folder / f"{name}.py").exists(), name
        assert callable(getattr(exported, name))


def test_sources_are_ascii():
    for path in FILES:
        assert path.read_text(encoding="utf-8").isascii(), path


def test_no_tracked_file_names_a_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    folder, host = (
        r"(?<![\w.])/(work|root|home|tmp/\w)/",
        r"\b(pypi|pythonhosted|npmjs)\.(org|com)\b",
    )
    own = re.compile(f"{folder}|{host}")
    assert own.search("cd /" + "work/x") and own.search("https://pypi" + ".org")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".bin", ".idx", ".npy", ".xz"):
            found = own.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found[0]}"


def test_every_module_imports_without_optional_packages():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if path.stem not in ("__init__", "__main__") and not path.stem.startswith("triton_")
    ]
    script = f"""
import sys
for name in ("triton", "apex", "transformer_engine", "flash_attn"):
    sys.modules[name] = None
from megascale.runtime import distributed
distributed.prepare_device("auto")
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("words", [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)])
def test_linters_are_content(words):
    if importlib.util.find_spec(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", *words, *([] if words[0] == "mypy" else ["."])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
