"""Prints the wheels of a folder whose packages this Python lacks: `gpu_missing.py FOLDER`."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(folder: Path) -> list[Path]:
    """Wheels of packages that are not installed, in any version."""
    return [path for path in sorted(folder.glob("*.whl")) if not has(path.name.split("-")[0])]


def has(package: str) -> bool:
    """Whether a package is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    for path in missing(Path(sys.argv[1])):
        print(path)
