"""Batch scripts of the folder `slurm` with what a user asks for filled in, and their submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megascale.errors import UserError
from megascale.installation import install_command, shipped_dir

MOST_NODES = 100_000
HERE = "# (megascale submit writes its settings below this line)"


def node_range(text: str) -> tuple[int, int]:
    """The fewest and the most nodes that `N` or `MIN-MAX` asks for. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text.strip())
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most <= MOST_NODES:
        raise UserError(f"--nodes {text}: write 8, or 6-8 for a run that goes on with 6 of 8")
    return least, most


def time_limit_s(text: str) -> int | None:
    """The seconds of a time limit as sbatch reads it; None for no limit. Raises UserError."""
    if text.strip().upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text.strip())
    if match is None:
        raise UserError(
            f"--time {text}: write 90 (minutes), 1:30:00, 2-12 (days, hours) or UNLIMITED"
        )
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes come first, otherwise hours
        return first * 60 + second or None
    return days * 86_400 + first * 3600 + second * 60 + third or None


def script_path(name: str) -> Path:
    """Where a batch script of this installation is."""
    return shipped_dir("slurm") / f"{name}.sbatch"


def read_script(name: str) -> str:
    """The text of a batch script of this installation. Raises UserError where there is none."""
    path = script_path(name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(
            f"{path} is missing in this installation; install it again: {install_command('')}"
        ) from None


@dataclass(frozen=True)
class BatchJob:
    """A batch script of this installation, and what is filled in."""

    script: str
    """`train`, `sweep` or `prepare`."""
    options: Mapping[str, str | None]
    """Of sbatch, by long name; None for one without a value. They replace the script's own."""
    settings: Mapping[str, str]
    """Environment variables."""
    arguments: Sequence[str]
    """Of the script."""

    def render(self) -> str:
        """The script. All is quoted: nothing in a value is ever expanded or run.

        Raises UserError for a script that is not there, and a value that sbatch cannot read.
        """
        head, _, body = read_script(self.script).partition(f"{HERE}\n")
        own = [line for line in head.splitlines() if _option(line) not in self.options]
        given = [f"#SBATCH --{name}{_value(name, v)}" for name, v in self.options.items()]
        exports = [f"export {name}={shlex.quote(v)}" for name, v in self.settings.items()]
        words = " ".join(shlex.quote(word) for word in self.arguments)
        return "\n".join([*own, *given, "", *exports, f"set -- {words}", body])


def submit(script: str) -> str:
    """Give a batch script to Slurm; the number of the job. Raises UserError where that fails."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine; submit from a login node of the cluster, or see what "
            "would be submitted with --dry-run"
        )
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"sbatch refused the job: {said[-1].removeprefix('sbatch: error: ')}")
    return done.stdout.strip().split(";")[0]


def requeue(job: str) -> None:
    """Ask Slurm to run a job once more, where its commands are at hand."""
    if shutil.which("scontrol") is not None:
        subprocess.run(["scontrol", "requeue", job], check=False)


def _option(line: str) -> str | None:
    """The long option that a line of #SBATCH sets."""
    match = re.match(r"#SBATCH --([a-z-]+)", line)
    return match[1] if match else None


def _value(name: str, value: str | None) -> str:
    """`=VALUE` as sbatch reads it: in double quotes, a backslash before quotes and backslashes."""
    if value is None:
        return ""
    if not value.isprintable():
        raise UserError(f"--{name} {value!r}: sbatch takes no line breaks or control characters")
    guarded = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'="{guarded}"'
