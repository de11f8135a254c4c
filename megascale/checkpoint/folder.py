"""Names inside a run's `checkpoints` folder, what is good there, and what may go. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from megascale.errors import UserError
from megascale.reading import MOST_TEXT_BYTES, read_whole
from megascale.runtime.abandoned import held, remove_abandoned
from megascale.runtime.files import (
    UNFINISHED,
    discard,
    private_folder,
    sync_folder,
    unfinished_file,
    unfinished_names,
    write_file,
)

LATEST = "latest"
LEFT = "left-behind"
"""File with the steps, a line each, of futures that the run went back from."""
EMERGENCY = "emergency"
"""File of a run that makes emergency copies: which of them belong to it."""
REPLACED = ".old-"
_LEFTOVER = re.compile(
    f"({re.escape(UNFINISHED)}|{re.escape(REPLACED)})[0-9]{{8,}}"
    f"|{re.escape(UNFINISHED)}({LATEST}|{LEFT}|{EMERGENCY})(-[0-9a-f]{{16}})?"
)
"""Names that an interrupted save leaves."""


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run are."""
    return Path(run_dir) / "checkpoints"


def copies_name(run_dir: Path) -> str:
    """Name of the folder that holds a run's emergency copies on a node; `run_dir` is resolved."""
    return f"{run_dir.name[:64]}-{xxhash.xxh3_64_hexdigest(str(run_dir).encode())}"


def name_of(step: int) -> str:
    """Folder name of a step: zero-padded, so that names sort as steps do."""
    return f"{step:08d}"


def steps_in(checkpoints: Path) -> list[int]:
    """Steps that have a finished-looking folder, in increasing order."""
    if not checkpoints.is_dir():
        return []
    names = (entry.name for entry in checkpoints.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if _is_step(name))


def make_copies_folder(base: Path, *levels: str) -> Path:
    """The private folder of emergency copies base/level/level...; levels[0] is the node's name.

    Raises UserError where it cannot be had.
    """
    try:
        return private_folder(base, *levels)
    except OSError as error:
        where = error.filename or base.joinpath(*levels)
        problem = f"checkpoint.emergency_dir: node {levels[0]}: {error.strerror}: {where}"
        advice = "give a folder that only you can write to"
        is_shared = isinstance(error, PermissionError)
        raise UserError(f"{problem}; {advice}" if is_shared else problem) from None


def read_latest(checkpoints: Path) -> int | None:
    """The step that `latest` names, or None when it is missing or says nothing usable."""
    try:
        text = read_whole(checkpoints / LATEST, MOST_TEXT_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if _is_step(text) else None


def left_behind(checkpoints: Path) -> set[int]:
    """Steps of futures that the run went back from: they are not ours to go on from, or to drop."""
    try:
        words = read_whole(checkpoints / LEFT, MOST_TEXT_BYTES).decode("ascii").split()
    except (OSError, UnicodeDecodeError):
        return set()
    return {int(word) for word in words if _is_step(word)}


def _is_step(text: str) -> bool:
    """Whether a text is the number of a step, which has at most 18 digits."""
    return text.isascii() and text.isdigit() and len(text) < 19


def _leave_behind(checkpoints: Path, steps: set[int]) -> None:
    if steps != left_behind(checkpoints):
        lines = "".join(f"{name_of(step)}\n" for step in sorted(steps))
        write_file(checkpoints / LEFT, lines, synced=True)


def own_steps(checkpoints: Path) -> list[int]:
    """`steps_in` without those that were left behind."""
    left = left_behind(checkpoints)
    return [step for step in steps_in(checkpoints) if step not in left]


def by_preference(steps: list[int], latest: int | None, left: Collection[int] = ()) -> list[int]:
    """Steps in the order in which a resume should try them.

    First the one that `latest` names, then the ones before it, newest first; steps after it and
    those that were `left` behind come last: they are of futures that this run went back from.
    """
    last = max(steps, default=0) if latest is None else latest
    return sorted(steps, key=lambda step: (step > last or step in left, -step))


def prunable(steps: list[int], newest: int, keep_last: int, keep_every_steps: int) -> list[int]:
    """Of a run's own steps those that may be deleted after saving `newest`.

    The last `keep_last` up to `newest` and multiples of `keep_every_steps` stay, and so do steps
    after `newest`.
    """
    past = sorted(step for step in steps if step <= newest)
    for_ever = {step for step in past if keep_every_steps and step % keep_every_steps == 0}
    return [step for step in past[:-keep_last] if step not in for_ever]


@contextmanager
def whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends well.

    What an earlier try that was killed has left there is removed first.
    Raises UserError where `out` exists or cannot be written, and OSError of what the block reads.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists; choose another folder or remove it")
    unfinished = unfinished_file(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent, unfinished_names(out))
        unfinished.mkdir()
        try:
            with held(unfinished):
                yield unfinished
                sync_folder(unfinished)
                unfinished.rename(out)
        finally:
            discard(unfinished)
        sync_folder(out.parent)
    except OSError as error:
        named = Path(os.fsdecode(error.filename or unfinished))
        if not named.is_relative_to(unfinished) and not out.is_relative_to(named):
            raise  # of a file that was read
        where = out if named.is_relative_to(unfinished) else named
        raise UserError(f"{where}: {error.strerror}; choose another folder") from None


def publish(checkpoints: Path, step: int) -> None:
    """Turn the unfinished folder of `step` into the checkpoint of that step, and name it latest.

    Every moment at which the machine may stop leaves either the old state or the new one.
    """
    name = name_of(step)
    target, aside = checkpoints / name, checkpoints / f"{REPLACED}{name}"
    if target.exists():
        discard(aside)
        target.rename(aside)
    (checkpoints / f"{UNFINISHED}{name}").rename(target)
    sync_folder(checkpoints)
    _leave_behind(checkpoints, left_behind(checkpoints) - {step})
    name_latest(checkpoints, step)
    discard(aside)


def go_on_from(checkpoints: Path, step: int) -> None:
    """Let `latest` name the checkpoint of `step`, and leave behind those after it."""
    later = {one for one in steps_in(checkpoints) if one > step}
    _leave_behind(checkpoints, (left_behind(checkpoints) | later) - {step})
    name_latest(checkpoints, step)


def name_latest(checkpoints: Path, step: int) -> None:
    """Let `latest` name the checkpoint of `step`."""
    write_file(checkpoints / LATEST, f"{name_of(step)}\n", synced=True)
    sync_folder(checkpoints)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what an interrupted save left behind, by its name."""
    if not checkpoints.is_dir():
        return
    for entry in checkpoints.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            discard(entry)


def remove_steps(checkpoints: Path, steps: list[int]) -> None:
    """Delete checkpoints; each is first renamed, so that none is ever seen half deleted.

    Of a link to a checkpoint the link goes, and what it leads to stays.
    """
    for step in steps:
        doomed = checkpoints / f"{REPLACED}{name_of(step)}"
        (checkpoints / name_of(step)).rename(doomed)
        discard(doomed)
