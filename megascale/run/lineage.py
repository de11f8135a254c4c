"""All runs and checkpoints that come from one another, as their folders tell. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megascale.checkpoint.folder import copies_name
from megascale.checkpoint.manifest import MANIFEST
from megascale.run.origin import LINEAGE, Origin, Parent, home_of, origin_of

RECORDS = (LINEAGE, f"*/{LINEAGE}", f"*/{MANIFEST}", f"*/*/{MANIFEST}")
"""Files, in a folder, that may say where something comes from. A run that grows keeps the grown
checkpoint in the folder of its small model."""
RUNS = ("config.yaml", "*/config.yaml")


@dataclass
class Family:
    """The members of a family: runs, and checkpoints that belong to no run."""

    origins: dict[Path, Origin | None] = field(default_factory=dict)
    """Where each member comes from; None for a first ancestor."""
    _runs_by_copies: dict[str, Path] = field(default_factory=dict)
    """The runs that were seen, by the name of the folder of their emergency copies."""

    def home(self, checkpoint: str | Path) -> Path:
        """The member that a checkpoint belongs to, also where an emergency copy is gone."""
        home = home_of(checkpoint)
        return self._runs_by_copies.get(home.parent.name, home)

    def parents(self, member: Path) -> list[tuple[Path, Parent]]:
        """(its home, the checkpoint) for each parent of a member."""
        origin = self.origins.get(member)
        return [(self.home(one.checkpoint), one) for one in (origin.parents if origin else ())]

    def children(self) -> dict[Path, list[Path]]:
        """The children of each member, each child once."""
        found: dict[Path, list[Path]] = {}
        for member in sorted(self.origins):
            for home in dict.fromkeys(home for home, _ in self.parents(member)):
                found.setdefault(home, []).append(member)
        return found

    def relatives(self, member: Path) -> set[Path]:
        """All members that are connected with one, itself too."""
        children = self.children()
        found, waiting = {member}, [member]
        while waiting:
            one = waiting.pop()
            near = {*children.get(one, ()), *(home for home, _ in self.parents(one))}
            waiting += near - found
            found |= near
        return found

    def look_in(self, folder: Path) -> None:
        """Learn of the members in a folder, and of all that they come from."""
        for path in (path for pattern in RUNS for path in folder.glob(pattern)):
            run = path.parent.resolve()
            self._runs_by_copies[copies_name(run)] = run
        for path in (path for pattern in RECORDS for path in folder.glob(pattern)):
            if path.parent.parent.name != "checkpoints":
                self.learn(path.parent.resolve())

    def learn(self, member: Path) -> None:
        """Learn where a member comes from, up to its first ancestors."""
        waiting = [member]
        while waiting:
            one = waiting.pop()
            if one not in self.origins:
                self.origins[one] = origin_of(one)
                waiting += [home for home, _ in self.parents(one)]


def family_of(checkpoint: Path, folders: Iterable[Path]) -> tuple[Path, Family]:
    """(the member that a run_dir or checkpoint belongs to, its family without others).

    Looks in `folders`, and beside every relative that it finds.
    """
    family, looked, relatives = Family(), set[Path](), set[Path]()
    waiting = {folder.resolve() for folder in folders}
    while True:
        for folder in waiting:
            family.look_in(folder)
        looked |= waiting
        before, member = relatives, family.home(checkpoint)
        for one in {member, *before}:
            family.learn(one)
        relatives = family.relatives(member)
        waiting = {one.parent for one in relatives} - looked
        if not waiting and relatives == before:
            family.origins = {one: family.origins.get(one) for one in relatives}
            return member, family


def tree(family: Family, marked: Path) -> Iterator[str]:
    """The family as lines: each member below a parent, first ancestors first.

    A member with several parents is below each of them, with its descendants below the first.
    """
    children, shown = family.children(), set[Path]()
    first = [member for member in sorted(family.origins) if not family.parents(member)]
    # where folders were made anew, there may be a circle, in which no member is first
    for member in (*first, marked, *sorted(family.origins)):
        if member not in shown:
            yield from _below(family, children, member, None, marked, shown, 0)


def _below(
    family: Family,
    children: Mapping[Path, list[Path]],
    member: Path,
    parent: Path | None,
    marked: Path,
    shown: set[Path],
    depth: int,
) -> Iterator[str]:
    again = member in shown
    how = _how(family, member, parent) if parent is not None else ""
    what_follows = "; what comes from it is shown above" * (again and member in children)
    mark = "  <-- this one" * (member == marked)
    yield f"{'  ' * depth}{member}{how}{_trouble(family, member)}{what_follows}{mark}"
    if again:
        return
    shown.add(member)
    for child in children.get(member, ()):
        yield from _below(family, children, child, member, marked, shown, depth + 1)


def _trouble(family: Family, member: Path) -> str:
    if not member.exists():
        return "; no longer there"
    unread = (member / LINEAGE).exists() and family.origins[member] is None
    return f"; its {LINEAGE} cannot be read" * unread


def _how(family: Family, member: Path, parent: Path) -> str:
    """Which checkpoints of `parent` a member comes from, how, and with whom."""
    origin = family.origins[member]
    assert origin is not None
    own = [one for home, one in family.parents(member) if home == parent]
    steps = " and ".join(f"step {one.step:,} ({one.tokens_seen:,} tokens)" for one in own)
    others = dict.fromkeys(home for home, _ in family.parents(member) if home != parent)
    shared = f", with {', '.join(map(str, others))}" if others else ""
    return f", from {steps}{shared}, by {origin.made_by}"
