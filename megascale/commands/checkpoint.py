"""`megascale checkpoint list`, `verify`, `prune`: what a run has saved, and what of it may go."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from megascale.checkpoint import folder as folders
from megascale.checkpoint.manifest import MANIFEST, Manifest, verify
from megascale.errors import UserError
from megascale.runtime.files import real_path


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale checkpoint list`."""
    parser.add_argument("run", metavar="RUN", help="folder of a run")


def run_list(args: argparse.Namespace) -> int:
    """Print a table; returns the exit status. Raises UserError for a folder without checkpoints.

    Sizes of files are compared with the manifest, contents are not read.
    """
    checkpoints, steps = _steps(Path(args.run))
    latest, left = folders.read_latest(checkpoints), folders.left_behind(checkpoints)
    print(f"{'step':>10}  {'tokens':>16}  {'MB':>9}  {'saved':<16}  layout")
    for step in steps:
        folder = checkpoints / folders.name_of(step)
        try:
            manifest = Manifest.read(folder)
        except UserError as error:
            print(f"{step:>10}  damaged: {error}")
            continue
        size = sum(file.bytes for file in manifest.files.values())
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / MANIFEST).stat().st_mtime))
        cut = " ".join(f"{axis} {ranks}" for axis, ranks in manifest.layout.items() if ranks > 1)
        notes = [cut or "one rank", *_missing(folder, manifest)] + ["latest"] * (step == latest)
        notes += ["left behind"] * (step in left)
        tokens = manifest.position.tokens_seen
        print(f"{step:>10}  {tokens:>16,}  {size / 1e6:>9,.1f}  {saved}  {', '.join(notes)}")
    return 0


def _missing(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the sizes of files."""
    bad = 0
    for name, file in manifest.files.items():
        path = folder / name
        bad += not path.is_file() or path.stat().st_size != file.bytes
    return [f"DAMAGED: {bad} of {len(manifest.files)} files"] if bad else []


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale checkpoint verify`."""
    add = parser.add_argument
    add("path", metavar="RUN_OR_CHECKPOINT", help="all of a run, or the folder of one")
    add("--step", type=int, metavar="N", help="of a run only this one")


def run_verify(args: argparse.Namespace) -> int:
    """Read every file and compare its checksum; returns 0, or 2 where something is damaged.

    Raises UserError where there is nothing to verify.
    """
    path = Path(args.path)
    if (path / MANIFEST).exists() or _is_named_as_one(path):
        if args.step is not None:
            raise UserError(
                f"{path} is one checkpoint, and --step is for a run; leave it out, or give the run"
            )
        found = [path]
    else:
        checkpoints, steps = _steps(path)
        if args.step is not None and args.step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"{checkpoints} holds no checkpoint of step {args.step}; {there} are")
        wanted = steps if args.step is None else [args.step]
        found = [checkpoints / folders.name_of(step) for step in wanted]
    damaged = 0
    for folder in found:
        faults = _faults(folder)
        damaged += bool(faults)
        print(f"{folder}: {'good' if not faults else '; '.join(faults[:5])}", flush=True)
    return 2 if damaged else 0


def _is_named_as_one(path: Path) -> bool:
    """Whether it is where a run has a checkpoint, whatever is in it."""
    name, parent = real_path(path).name, real_path(path).parent
    return path.is_dir() and name.isdigit() and parent == folders.checkpoints_dir(parent.parent)


def _faults(folder: Path) -> list[str]:
    try:
        manifest = Manifest.read(folder)
    except UserError as error:
        return [str(error)]
    return [str(fault) for fault in verify(folder, manifest)]


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale checkpoint prune`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run")
    add("--keep-last", type=int, required=True, metavar="N", help="the last N stay, at least 1")
    add("--keep-every", type=int, default=0, metavar="N", help="and multiples of N steps")
    add("--dry-run", action="store_true", help="only say what would go")


def run_prune(args: argparse.Namespace) -> int:
    """Delete checkpoints that are not to be kept; returns the exit status.

    Nothing goes unless the newest that stays is good. Steps after the one that `latest` names
    stay too, and so do those that the run left behind. Raises UserError for bad input.
    """
    if args.keep_last < 1 or args.keep_every < 0:
        raise UserError("--keep-last must be at least 1, and --keep-every at least 0")
    checkpoints, steps = _steps(Path(args.run))
    latest = folders.read_latest(checkpoints)
    newest = latest if latest in steps else steps[-1]
    own = folders.own_steps(checkpoints)
    doomed = folders.prunable(own, newest, args.keep_last, args.keep_every)
    if not doomed:
        print(f"nothing to delete: {_named(steps)} stay")
        return 0
    faults = _faults(checkpoints / folders.name_of(newest))
    if faults:
        raise UserError(
            f"the newest checkpoint that would stay, of step {newest}, is damaged ({faults[0]}); "
            "nothing was deleted"
        )
    size = sum(file.stat().st_size for step in doomed for file in _files(checkpoints, step))
    if not args.dry_run:
        folders.remove_steps(checkpoints, doomed)
    verb = "would delete" if args.dry_run else "deleted"
    left = [step for step in steps if step not in doomed]
    print(f"{verb} {_named(doomed)} ({size / 1e6:,.1f} MB); {_named(left)} stay")
    return 0


def _files(checkpoints: Path, step: int) -> list[Path]:
    return [one for one in (checkpoints / folders.name_of(step)).rglob("*") if one.is_file()]


def _named(steps: Sequence[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"


def _steps(run: Path) -> tuple[Path, list[int]]:
    checkpoints = folders.checkpoints_dir(run)
    steps = folders.steps_in(checkpoints)
    if not steps:
        raise UserError(f"{checkpoints} holds no checkpoint; give the run_dir of a run")
    return checkpoints, steps
