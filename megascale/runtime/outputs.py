"""Files that a command writes where its user said: never over what it reads, or what others made.

A command says before its work begins what it will write. A file that is there is replaced only
where it is of the kind that the command writes, as after the same command before, or empty.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from megascale.errors import UserError
from megascale.parsing import read_json
from megascale.runtime.files import is_stream, real_path

HEAD_BYTES = 1 << 18
"""Of a file, by which its kind is told; as many of its end."""
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    """With its article, for messages."""
    fits: Callable[[Path], bool]
    """Whether a file is of this kind. May raise OSError, and UserError for a damaged one."""
    endings: tuple[str, ...] = ()
    """Of which a new file must have one; none: any."""


@dataclass(frozen=True)
class Output:
    """A file that a command will write."""

    option: str
    """Which option of the command names it."""
    path: Path
    kind: Kind
    makes_folders: bool = False
    """The command makes the folders above it."""


def json_of(name: str, *keys: str) -> Kind:
    """JSON objects that have at least these keys."""

    def fits(path: Path) -> bool:
        value = read_json(path)
        return isinstance(value, dict) and value.keys() >= set(keys)

    return Kind(name, fits)


def begins_with(name: str, beginning: bytes, marks: Sequence[bytes] = ()) -> Kind:
    """Files with this beginning that have each of `marks` in their first or last bytes."""

    def fits(path: Path) -> bool:
        found = _ends_of(path)
        return found.startswith(beginning) and all(mark in found for mark in marks)

    return Kind(name, fits)


def picture(*endings: str) -> Kind:
    """Pictures that matplotlib has drawn, which writes its name into them."""

    def fits(path: Path) -> bool:
        found = _ends_of(path)
        return bool(re.match(rb"\x89PNG\r\n\x1a\n|<\?xml|%PDF", found)) and b"atplotlib" in found

    return Kind("a picture of a command like this", fits, endings or PICTURES)


def require_outputs(outputs: Sequence[Output], reads: Iterable[str | Path | None] = ()) -> None:
    """Raise UserError for the first output that cannot be written, or would cost its user a file.

    `reads` are what the command reads; None stands for an input that is not given.
    """
    inputs = [Path(path) for path in reads if path is not None]
    for output in outputs:
        _require_ending(output)
        if not is_stream(output.path):
            _require_place(output)
            _require_replaceable(output, inputs)
    for first, second in combinations(outputs, 2):
        if real_path(first.path) == real_path(second.path):
            raise UserError(
                f"{second.option} {second.path}: is the file of {first.option} too; choose another"
            )


def _require_ending(output: Output) -> None:
    endings = output.kind.endings
    if endings and output.path.suffix.lower() not in endings:
        *most, last = endings
        works = f"{', '.join(most)} or {last}" if most else last
        raise UserError(f"{output.option} {output.path}: must end in {works}")


def _require_place(output: Output) -> None:
    """The folder must be there, or be one that can be made; one may write in it."""
    folder = output.path.parent
    if output.makes_folders:
        folder = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), folder)
    problem = None
    if not folder.is_dir():
        problem = f"{folder} is no folder" if os.path.lexists(folder) else f"no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"no permission to write in {folder}"
    if problem is not None:
        place = f"{output.option} {output.path}"
        raise UserError(f"{place}: cannot be made: {problem}; choose another place")


def _require_replaceable(output: Output, inputs: Sequence[Path]) -> None:
    place = f"{output.option} {output.path}"
    try:
        about = os.stat(output.path)
    except FileNotFoundError:
        return
    except OSError as error:
        problem = f"cannot be made: {error.strerror}"
        raise UserError(f"{place}: {problem}; choose another place") from None
    if stat.S_ISDIR(about.st_mode):
        raise UserError(f"{place}: there, and not a file; choose another name")
    if not stat.S_ISREG(about.st_mode):
        return  # nothing there is lost
    for path in inputs:
        if _is_same(about, path):
            problem = f"would take the place of {path}, which is read"
            raise UserError(f"{place}: {problem}; choose another")
    if about.st_size and not _fits(output):
        raise UserError(
            f"{place}: there, and not {output.kind.name}; choose another file, or move it away"
        )


def _is_same(about: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(about, os.stat(path))
    except OSError:  # not there, or beyond reach: said where it is opened
        return False


def _fits(output: Output) -> bool:
    try:
        return output.kind.fits(output.path)
    except (OSError, UserError):
        return False


def _ends_of(path: Path) -> bytes:
    """The first and the last bytes of a file."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(HEAD_BYTES, os.fstat(file.fileno()).st_size - HEAD_BYTES))
        return head + file.read(HEAD_BYTES)


def write_as_asked(option: str, name: str, write: Callable[[Path], object]) -> None:
    """Write the file `name` that an option has asked for, and print that it is there.

    Raises UserError where that fails.
    """
    try:
        write(Path(name))
    except (OSError, ValueError) as error:  # matplotlib: ValueError for an unknown ending
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{option} {name}: {reason}") from None
    print(f"wrote {name}")
