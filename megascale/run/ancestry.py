"""What came before a run: the runs that it goes on from, as long as there is one parent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megascale.monitor.metrics import METRICS_FILE
from megascale.monitor.run_curves import EarlierPart
from megascale.run.origin import Origin, home_of, origin_of
from megascale.runtime.files import real_path


def forebears(run_dir: Path) -> Iterator[tuple[Path, Origin]]:
    """(a run, where it comes from), from `run_dir` back to the first run, or to a merged one."""
    folder, seen = real_path(run_dir), set[Path]()
    while folder not in seen:  # folders that were made anew may go round
        seen.add(folder)
        origin = origin_of(folder)
        if origin is None or not origin.parents:
            return
        yield folder, origin
        if len(origin.parents) > 1:
            return
        folder = home_of(origin.parents[0].checkpoint)


def earlier_parts(run_dir: Path) -> list[EarlierPart]:
    """The runs that a branch, or a grown run, goes on from, oldest first; empty for others.

    A run that several checkpoints were merged into begins anew. Runs without metrics here, such as
    an import or one that was deleted, are passed over.
    """
    own, parts = real_path(run_dir), list[EarlierPart]()
    for _, origin in forebears(run_dir):
        if len(origin.parents) > 1:
            break
        parent = origin.parents[0]
        folder = home_of(parent.checkpoint)
        if folder != own and (folder / METRICS_FILE).exists():
            parts.append(EarlierPart(folder, parent.step))
    return parts[::-1]
