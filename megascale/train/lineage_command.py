"""`megascale lineage`: which runs a run comes from, and which come from it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from megascale.checkpoint.manifest import MANIFEST
from megascale.errors import UserError
from megascale.train.start import LINEAGE, home_of, origin_of


def add_lineage_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale lineage`."""
    add = parser.add_argument
    add("run", metavar="RUN_OR_CHECKPOINT", help="a run_dir, or the folder of one checkpoint")
    add("--among", metavar="DIR", help="where to look for descendants; default: beside RUN")


def run_lineage(args: argparse.Namespace) -> int:
    """Print the tree; returns the exit status. Raises UserError for bad input."""
    run = Path(args.run).resolve()
    if not any((run / name).exists() for name in (LINEAGE, MANIFEST, "config.yaml", "checkpoints")):
        raise UserError(f"{args.run}: no run; give a run_dir or the folder of a checkpoint")
    among = Path(args.among) if args.among else run.parent
    if not among.is_dir():
        raise UserError(f"--among {among}: no such folder")
    print(run)
    print("".join(_ancestors(run, (run,))), end="")
    children: dict[Path, list[Path]] = {}
    for folder in sorted({path.parent.resolve() for path in _records(among)}):
        origin = origin_of(folder)
        for parent in origin.parents if origin else ():
            children.setdefault(home_of(parent.checkpoint), []).append(folder)
    print("".join(_descendants(run, children, (run,))), end="")
    return 0


def _records(among: Path) -> Iterator[Path]:
    """Files, in `among` and in its folders, that may say where something comes from.

    A run that grows keeps the grown checkpoint in the folder of its small model.
    """
    for pattern in (LINEAGE, f"*/{LINEAGE}", f"*/{MANIFEST}", f"*/*/{MANIFEST}"):
        yield from among.glob(pattern)


def _ancestors(folder: Path, seen: tuple[Path, ...]) -> Iterator[str]:
    origin = origin_of(folder)
    for parent in origin.parents if origin else ():
        home = home_of(parent.checkpoint)
        gone = "" if home.is_dir() else "  (no longer there)"
        yield (
            f"{'  ' * len(seen)}from {home}, step {parent.step:,}, "
            f"{parent.tokens_seen:,} tokens, by {origin.made_by if origin else ''}{gone}\n"
        )
        if home not in seen:
            yield from _ancestors(home, (*seen, home))


def _descendants(
    folder: Path, children: Mapping[Path, list[Path]], seen: tuple[Path, ...]
) -> Iterator[str]:
    for child in children.get(folder, ()):
        yield f"{'  ' * len(seen)}to {child}\n"
        if child not in seen:
            yield from _descendants(child, children, (*seen, child))
