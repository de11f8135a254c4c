"""`megascale lineage`: which runs a run comes from, and which come from it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megascale.checkpoint.manifest import MANIFEST
from megascale.errors import UserError
from megascale.train.start import LINEAGE, Origin


def add_lineage_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale lineage`."""
    add = parser.add_argument
    add("run", metavar="RUN_OR_CHECKPOINT", help="a run_dir, or the folder of one checkpoint")
    add("--among", metavar="DIR", help="where to look for descendants; default: beside RUN")


def run_lineage(args: argparse.Namespace) -> int:
    """Print the tree; returns the exit status. Raises UserError for bad input."""
    run = Path(args.run).resolve()
    if not run.is_dir():
        raise UserError(f"{args.run}: no such folder; give a run_dir or the folder of a checkpoint")
    among = Path(args.among) if args.among else run.parent
    if not among.is_dir():
        raise UserError(f"--among {among}: no such folder")
    print(run)
    print("".join(_ancestors(run, (run,))), end="")
    children: dict[Path, list[Path]] = {}
    for folder in sorted({path.parent.resolve() for path in _records(among)}):
        origin = _origin(folder)
        for parent in origin.parents if origin else ():
            children.setdefault(_home(parent.checkpoint), []).append(folder)
    print("".join(_descendants(run, children, (run,))), end="")
    return 0


def _records(among: Path) -> Iterator[Path]:
    """Files, in `among` and in its folders, that may say where something comes from."""
    for pattern in (LINEAGE, f"*/{LINEAGE}", f"*/{MANIFEST}"):
        yield from among.glob(pattern)


def _origin(folder: Path) -> Origin | None:
    """Where a run or a checkpoint that is no run's own comes from; None where nothing says."""
    try:
        if (folder / LINEAGE).exists():
            return Origin.from_json(json.loads((folder / LINEAGE).read_bytes()))
        document = json.loads((folder / MANIFEST).read_bytes())
        return Origin.from_json(document["position"]["cursor"]["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _home(checkpoint: str) -> Path:
    """The run that a checkpoint belongs to, or its own folder where it belongs to none."""
    path = Path(checkpoint)
    return path.parents[1] if path.parent.name == "checkpoints" else path


def _ancestors(folder: Path, seen: tuple[Path, ...]) -> Iterator[str]:
    origin = _origin(folder)
    for parent in origin.parents if origin else ():
        home = _home(parent.checkpoint)
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
