"""Rows of an acceptance: what was measured, its target and what was found.

Each row is printed and written to a JSON file as soon as it is known, so a part that fails or runs
out of time leaves the rows before.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TIMED_OUT = (124, 137)
"""Statuses of a program that `timeout` ended."""


@dataclass(frozen=True)
class Row:
    """One line of the acceptance."""

    part: str
    what: str
    found: float | str | None
    """A number, the error that came in its place, or None where it could not be measured."""
    unit: str = ""
    least: float | None = None
    most: float | None = None
    passed: bool | None = None
    """None: there is no target, or it means nothing on this machine."""

    @property
    def target(self) -> str:
        """The bounds in words."""
        bounds = [f">= {self.least:g}"] if self.least is not None else []
        bounds += [f"<= {self.most:g}"] if self.most is not None else []
        return " ".join([*bounds, self.unit]).strip() if bounds else "-"

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        found = f"{self.found:.4g}" if isinstance(self.found, int | float) else str(self.found)
        return f"{verdict:4}  {self.what:58}  target {self.target:14}  found {found} {self.unit}"


def judge(found: float | str | None, least: float | None, most: float | None) -> bool | None:
    """Whether a value lies within its bounds; an error does not, and NaN does not."""
    if isinstance(found, str):
        return False
    if found is None or (least is None and most is None):
        return None
    return (least is None or found >= least) and (most is None or found <= most)


class Rows:
    """The rows of one part in the file of an acceptance."""

    def __init__(self, path: Path, part: str, small: bool = False, keep: bool = False) -> None:
        """Rows that the file has of other parts are kept, and with `keep` those of this part."""
        self.path, self.part, self.small = path, part, small
        self._document: dict[str, Any] = {"machine": machine(), "small": small, "rows": []}
        if path.exists():
            earlier = json.loads(path.read_text())["rows"]
            self._document["rows"] = [row for row in earlier if keep or row["part"] != part]

    def add(
        self,
        what: str,
        found: float | str | None,
        unit: str = "",
        least: float | None = None,
        most: float | None = None,
        on_device: bool = False,
    ) -> None:
        """One more row. With `on_device` the target means nothing at small sizes on a CPU."""
        passed = None if on_device and self.small else judge(found, least, most)
        row = Row(self.part, what, found, unit, least, most, passed)
        print(row, flush=True)
        self._document["rows"].append(asdict(row))
        self._write()

    def ended(self, status: int) -> None:
        """The part did not run to its end, but ended with this status."""
        why = "out of time" if status in TIMED_OUT else f"status {status}"
        self.add(f"part {self.part} runs to its end", why)

    @contextlib.contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """An error inside becomes a row, and the part goes on after the block."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:200]
            self.add(what, f"{type(error).__name__}: {text}")

    def _write(self) -> None:
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self._document, indent=1) + "\n")
        os.replace(beside, self.path)


def measure_all(rows: Rows, measures: tuple[Callable[[Rows], None], ...]) -> None:
    """Call each; one that fails leaves a row, with the first line of its docstring."""
    for measure in measures:
        with rows.measuring((measure.__doc__ or measure.__name__).splitlines()[0].rstrip(".")):
            measure(rows)


def machine() -> dict[str, Any]:
    """Where this runs."""
    cuda = torch.cuda.is_available()
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def main() -> int:
    """Print how many rows of a file passed and which failed: `gpu_rows.py FILE`."""
    rows = [Row(**row) for row in json.loads(Path(sys.argv[1]).read_text())["rows"]]
    failed = [row for row in rows if row.passed is False]
    print(f"{sum(row.passed is True for row in rows)} of {len(rows)} rows pass, {len(failed)} fail")
    for row in failed:
        print(f"{row.part}: {row}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
