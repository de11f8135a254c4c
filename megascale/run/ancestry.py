"""What came before a run, for pictures of it: the runs that it goes on from."""

from __future__ import annotations

from pathlib import Path

from megascale.monitor.metrics import METRICS_FILE
from megascale.monitor.run_curves import EarlierPart
from megascale.run.origin import home_of, origin_of
from megascale.runtime.files import real_path


def earlier_parts(run_dir: Path) -> list[EarlierPart]:
    """The runs that a branch, or a grown run, goes on from, oldest first; empty for others.

    A run that several checkpoints were merged into begins anew. Runs without metrics here, such as
    an import or one that was deleted, are passed over.
    """
    folder = real_path(run_dir)
    seen, parts = {folder}, list[EarlierPart]()
    while True:
        origin = origin_of(folder)
        if origin is None or len(origin.parents) != 1:
            break
        parent = origin.parents[0]
        folder = home_of(parent.checkpoint)
        if folder in seen:  # folders that were made anew
            break
        seen.add(folder)
        if (folder / METRICS_FILE).exists():
            parts.append(EarlierPart(folder, parent.step))
    return parts[::-1]
