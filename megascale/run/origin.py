"""Where a run, or a checkpoint that no run wrote, comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megascale.checkpoint.folder import copies_name
from megascale.checkpoint.load import Found, read_manifest
from megascale.checkpoint.manifest import MANIFEST, Position
from megascale.config import parse_config
from megascale.convert.huggingface.kept import Kept, pass_on
from megascale.errors import UserError
from megascale.parsing import is_path, read_json
from megascale.runtime.files import real_path

COPY_ID = re.compile("[0-9a-f]{32}")
"""Name of the folder that holds the emergency copies of a start."""
LINEAGE = "lineage.json"
"""File of a run_dir: the origin of the run."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that something was made from."""

    checkpoint: str
    """Its folder, absolute."""
    step: int
    tokens_seen: int

    @staticmethod
    def of(found: Found) -> Parent:
        """A found checkpoint as a parent."""
        return Parent.at(found.folder, found.manifest.position)

    @staticmethod
    def at(folder: Path, position: Position) -> Parent:
        """The checkpoint in `folder` as a parent."""
        return Parent(str(folder.resolve()), position.step, position.tokens_seen)

    def is_sound(self) -> bool:
        """Whether there could be such a checkpoint."""
        numbers = (self.step, self.tokens_seen)
        return is_path(self.checkpoint) and all(type(n) is int and n >= 0 for n in numbers)


@dataclass(frozen=True)
class Origin:
    """Where a run, or a checkpoint that no run wrote, comes from."""

    made_by: str
    """What made it, in words that a user can type."""
    parents: tuple[Parent, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values for `json.dump`."""
        return asdict(self)

    @staticmethod
    def from_json(value: Any) -> Origin:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        origin = Origin(value["made_by"], tuple(Parent(**one) for one in value["parents"]))
        if not isinstance(origin.made_by, str) or not all(map(Parent.is_sound, origin.parents)):
            raise ValueError("parents that cannot be")
        return origin


def origin_of(folder: Path) -> Origin | None:
    """Where a run or a checkpoint that is no run's own comes from; None where nothing says."""
    try:
        if (folder / LINEAGE).exists():
            return Origin.from_json(read_json(folder / LINEAGE))
        document = read_json(folder / MANIFEST)
        return Origin.from_json(document["position"]["cursor"]["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def home_of(checkpoint: str | Path) -> Path:
    """The run that a checkpoint belongs to, or its own folder where it belongs to none.

    An emergency copy belongs to the run that made it, as long as the copy is there to say so.
    """
    path = Path(checkpoint)
    if path.parent.name != "checkpoints":
        return path
    home = path.parents[1]
    return _run_of_copy(path) or home if COPY_ID.fullmatch(home.name) else home


def _run_of_copy(folder: Path) -> Path | None:
    """The run that made an emergency copy; None where the copy does not say."""
    try:
        position = read_manifest(folder).position
        run_dir = parse_config(position.config).run_dir
    except UserError:
        return None
    run = real_path(Path(position.cursor.get("cwd", ""), run_dir))
    return run if copies_name(run) == folder.parents[2].name else None


def kept_of(found: Found) -> Kept | None:
    """What the run of a checkpoint has kept of an import; None where it kept nothing."""
    return Kept.of(home_of(found.folder.resolve()))


def keep_of_import(parent: Found, home: Path) -> None:
    """Let a run, or a checkpoint that no run wrote, keep what its parent has kept of an import.

    Raises UserError where that cannot be read, OSError.
    """
    config = parse_config(parent.manifest.position.config, where=str(parent.folder))
    pass_on(home_of(parent.folder.resolve()), home, config.data.context_tokens)


def require_relatives(branches: Sequence[Found]) -> None:
    """Raise UserError where two of these come from different initial weights, as far as known."""
    first, *others = branches
    for other in others:
        if not _ancestry(other) & _ancestry(first):
            raise UserError(
                f"{other.folder} and {first.folder} do not come from one model (megascale lineage "
                "shows from which they come); experts need branches of one"
            )


def _ancestry(found: Found) -> set[str]:
    """The folders that a checkpoint comes from, and the initial weights where it is known."""
    folders = [home_of(found.folder.resolve())]
    known: set[str] = set()
    while folders:
        folder = folders.pop()
        origin = origin_of(folder)
        parents = origin.parents if origin is not None else ()
        folders += [home for one in parents if str(home := home_of(one.checkpoint)) not in known]
        known |= {str(folder)} if parents else {str(folder), *_seed_of(folder)}
    return known


def _seed_of(folder: Path) -> list[str]:
    """The seed that a run without parents drew its weights by; equal runs have equal ones."""
    try:
        position = read_manifest(folder).position
    except UserError:
        return []
    if not position.step:
        return []  # an import has drawn nothing
    return [f"seed {parse_config(position.config).seed}"]
