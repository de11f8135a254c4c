"""`megascale lineage`: the runs that a run comes from, and all that come from them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megascale.checkpoint.manifest import MANIFEST
from megascale.errors import UserError
from megascale.run.lineage import family_of, tree
from megascale.run.origin import LINEAGE
from megascale.runtime.files import real_path


def add_lineage_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale lineage`."""
    add = parser.add_argument
    add("run", metavar="RUN_OR_CHECKPOINT", help="a run_dir, or the folder of one checkpoint")
    add(
        "--among",
        metavar="DIR",
        help="where else to look for relatives; they are looked for beside RUN, beside each "
        "relative that is found, and in the folders of the current one",
    )


def run_lineage(args: argparse.Namespace) -> int:
    """Print the tree; returns the exit status. Raises UserError for bad input."""
    run = real_path(args.run)
    if not any((run / name).exists() for name in (LINEAGE, MANIFEST, "config.yaml", "checkpoints")):
        raise UserError(f"{args.run}: no run; give a run_dir or the folder of a checkpoint")
    here = Path.cwd()
    folders = [here, *(one for one in here.iterdir() if one.is_dir() and one.name[0] != ".")]
    if args.among:
        among = Path(args.among)
        if not among.is_dir():
            raise UserError(f"--among {among}: no such folder")
        folders.append(among)
    member, family = family_of(run, folders)
    for line in tree(family, member):
        print(line)
    return 0
