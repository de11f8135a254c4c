"""A sweep: a file of overrides, a run for every line, which `slurm/sweep.sbatch` reads too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megascale.errors import UserError
from megascale.reading import MOST_TEXT_BYTES, read_whole
from megascale.run.preflight import fitting_config
from megascale.runtime.files import real_path


def read_sweep(path: str) -> list[list[str]]:
    """The overrides of every run of a sweep. Raises UserError."""
    try:
        text = read_whole(path, MOST_TEXT_BYTES, or_stream=True).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--sweep {path}: {reason}; give a file of overrides, a line a run"
        ) from None
    lines = text.removesuffix("\n").split("\n")
    return [sweep_words(line, f"--sweep {path}, line {i}") for i, line in enumerate(lines, 1)]


def sweep_words(line: str, where: str) -> list[str]:
    """The words of a line as xargs reads it in slurm/sweep.sbatch. Raises UserError."""
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", line):
        raise UserError(
            f"{where} holds a carriage return or another control character; end lines as Unix does"
        )
    reader = shlex.shlex(line, posix=True)
    reader.whitespace, reader.whitespace_split, reader.commenters = " \t", True, ""
    reader.escapedquotes = ""  # to xargs a backslash in quotes is a letter like others
    try:
        words = list(reader)
    except ValueError as error:
        raise UserError(f"{where}: {str(error).lower()}; pair the quotes") from None
    if not words:
        raise UserError(f"{where} is empty; every line must hold overrides")
    return words


def check_sweep(
    config_path: str,
    overrides: Sequence[str],
    path: str,
    runs: Sequence[Sequence[str]],
    folder: str,
    worlds: Sequence[int],
) -> None:
    """All runs of a sweep are sound, and none writes where another does. Raises UserError.

    `runs` are the overrides of each line of the file `path`. A run without a run_dir has
    `folder`/INDEX. Each must fit worlds of the sizes `worlds`.
    """
    owners: dict[Path, int] = {}
    for index, run in enumerate(runs):
        words = [f"run_dir={folder}/{index}", *overrides, *run]  # as slurm/sweep.sbatch
        for run_dir in fitting_config(config_path, words, worlds).run_dirs:
            owner = owners.setdefault(real_path(run_dir), index)
            if owner != index:
                raise UserError(
                    f"--sweep {path}: lines {owner + 1} and {index + 1} have one run_dir, "
                    f"{run_dir}; give each its own, or none anywhere for {folder}/INDEX"
                )
