"""How this copy of megascale is installed: where its example files are, and which packages lack.

A checkout and an editable install have the folders `configs`, `data` and `slurm` at their top. A
wheel has copies of them in `megascale/bundled`, which the build makes (`pyproject.toml`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from urllib.parse import unquote, urlsplit

from megascale.errors import UserError

EXAMPLES = ("configs", "data")
"""Folders whose files a user may name, such as configs/quickstart.yaml."""
PACKAGE_OF = {"yaml": "pyyaml", "megatron.core": "megatron-core", "lm_eval": "lm-eval"}
"""Modules whose package has another name."""
MODULES = {
    "": ("highspy", "matplotlib", "numpy", "psutil", "rich", "xxhash", "yaml"),
    "data": (
        "datasets",
        "mpi4py",
        "numba",
        "pyarrow",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "tqdm",
        "transformers",
    ),
    "train": ("megatron.core", "tensorboard", "torch"),
    "eval": ("lm_eval",),
    "trackers": ("mlflow", "trackio", "wandb"),
}
"""The modules of the packages that each extra of `pyproject.toml` installs; "": without any."""
NEEDED_BY_RANKS = ("megatron-core", "torch")
"""Packages without which no rank can be started."""
GIT_S = 10.0
"""What git may take to say at which commit a checkout is."""


def shipped_dir(name: str) -> Path:
    """The folder `configs`, `data` or `slurm` that came with this code."""
    package = Path(__file__).parent
    bundled = package / "bundled"
    return (bundled if bundled.is_dir() else package.parent) / name


def given_or_example(path: str | Path) -> Path:
    """The path of a file that a user named.

    A relative path is looked up in the working directory first. If nothing is there, a path such as
    configs/quickstart.yaml is looked up among the examples that came with this code. A line on
    stderr then says which file is taken.
    """
    path = Path(path)
    top, *inner = path.parts or ("",)
    if top not in EXAMPLES or ".." in inner or os.path.lexists(path):
        return path
    example = shipped_dir(top).joinpath(*inner)
    if not example.is_file():
        return path
    _announce(path, example)
    return example


@cache
def _announce(path: Path, example: Path) -> None:
    """Say once, and on the first rank alone, that an example is taken."""
    if os.environ.get("RANK", "0") == "0":
        print(f"megascale: {path} is not here; {example} is taken", file=sys.stderr)


def is_installed(module: str) -> bool:
    """Whether a module can be found. It is not imported, but for the packages around it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that cannot be found."""
    return [PACKAGE_OF.get(name, name) for name in MODULES[extra] if not is_installed(name)]


def require_training() -> None:
    """Raise UserError if torch or megatron-core cannot be found, before ranks are started."""
    missing = [name for name in missing_packages("train") if name in NEEDED_BY_RANKS]
    if missing:
        raise UserError(_complaint("training", " and ".join(missing), "train"))


def complaint_about(error: ModuleNotFoundError, verb: str) -> str | None:
    """One line for a verb that a missing package has stopped; None if no known package is missing.

    So a missing module of megascale, or of a package that is installed, stays a fault.
    """
    missing = error.name or ""
    for extra, modules in MODULES.items():
        for module in modules:
            related = f"{missing}.".startswith(f"{module}.") or module.startswith(f"{missing}.")
            if related and not is_installed(module):
                return _complaint(verb, PACKAGE_OF.get(module, module), extra)
    return None


def _complaint(verb: str, packages: str, extra: str) -> str:
    return f"{verb} needs {packages}, not installed here: {install_command(extra)}"


def install_command(extra: str) -> str:
    """What installs the packages of an extra, or those of no extra (""), beside this code.

    megascale is on no package index, so the command names what it was installed from: a checkout,
    a wheel file, or an address.
    """
    suffix = f"[{extra}]" if extra else ""
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {quote(f'{checkout}{suffix}')}"
    address = _installed_from()
    if address is None:
        return f"in the checkout of megascale: pip install -e {quote(f'.{suffix}')}"
    parts = urlsplit(address)
    if parts.scheme == "file":
        return f"pip install {quote(f'{unquote(parts.path)}{suffix}')}"
    return f"pip install {quote(f'megascale{suffix} @ {address}')}"


def _installed_from() -> str | None:
    """The address that pip keeps of what it was given (PEP 610); None if it was given a name."""
    from importlib import metadata  # here, since few commands need it

    try:
        text = metadata.distribution("megascale").read_text("direct_url.json")
        facts = json.loads(text) if text else {}
        address = str(facts["url"])
    except (metadata.PackageNotFoundError, ValueError, KeyError, OSError):
        return None
    kind = facts.get("vcs_info", {}).get("vcs")
    return f"{kind}+{address}" if kind else address


def versions() -> dict[str, str]:
    """The versions of this code and of what ranks need, by package.

    The version of a checkout is followed by its commit, and by "changed" where files differ.
    """
    from importlib import metadata  # here, since few commands need it

    from megascale import __version__

    found = {"megascale": " ".join(filter(None, (__version__, _commit())))}
    for name in reversed(NEEDED_BY_RANKS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of the checkout that this code is in; empty where there is none, or no git."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "--no-optional-locks", "describe", "--always"]
    command += ["--dirty= changed", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return f"at commit {done.stdout.strip()}" if done.returncode == 0 else ""
