"""Copies of the latest state on the nodes' own disks, more often than the shared folder gets one.

A copy has the files of a checkpoint. A node holds those of its own ranks and those of the node
before it in a ring, besides the index and the manifest, so a lost node's files are still there. In

    DIR/NODE/RUN/ID/checkpoints/STEP

All folders below DIR belong to this user alone (mode 0700). Other users may write to a node's disk,
so a link or a folder of theirs is refused.

NODE is the node's name, RUN stands for the run's folder, and ID is drawn when the run begins, so
that nobody resumes another run of the same name. Who resumes takes the newest copy whose files are
all good somewhere, if it is newer than the shared checkpoint, and is sent what its node lacks.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.checkpoint import folder as folders
from megascale.checkpoint.load import Found
from megascale.checkpoint.manifest import MANIFEST, Manifest, verify
from megascale.checkpoint.node_ring import NodeRing
from megascale.checkpoint.storage import Entry, Written, one_line, write_index, write_tensors
from megascale.errors import UserError
from megascale.reading import MOST_TEXT_BYTES, read_whole
from megascale.runtime.distributed import Ranks
from megascale.runtime.files import (
    UNFINISHED,
    discard,
    sync_folder,
    write_file,
)
from megascale.runtime.first_rank import from_first_rank
from megascale.runtime.placement import node_name

IDENTITY = re.compile("[0-9a-f]{32}")
KEPT = 2
"""Copies of a node: while the newest is made, the one before it must be whole on all of them."""


class Emergency:
    """The copies of one run, as one rank sees them. All ranks call all methods."""

    def __init__(self, run_dir: str | Path, directory: str, ranks: Ranks, anew: bool) -> None:
        """`anew`: the run leaves behind what it was, and all copies of it, also those of nodes
        that are not here now.

        Raises UserError, on every rank, where nodes have unequal numbers of ranks or a node
        cannot write to its directory."""
        self._ranks, self._ring, name = ranks, NodeRing(ranks), node_name()
        run = Path(run_dir).resolve()
        key = folders.copies_name(run)
        identity = self._identity(folders.checkpoints_dir(run), anew)
        self.checkpoints = Path(directory) / name / key / identity / "checkpoints"
        self._prepare(Path(directory), name, key, identity)

    def _identity(self, checkpoints: Path, anew: bool) -> str:
        """What the run is known by, drawn by its first start and whenever it goes back."""

        def draw() -> bytes:
            path, known = checkpoints / folders.EMERGENCY, ""
            with contextlib.suppress(OSError, UnicodeDecodeError):
                known = read_whole(path, MOST_TEXT_BYTES).decode("ascii").strip()
            if anew or not IDENTITY.fullmatch(known):
                known = secrets.token_hex(16)
                write_file(path, known, synced=True)
            return known.encode()

        return from_first_rank(self._ranks, draw).decode()

    def _prepare(self, base: Path, name: str, key: str, identity: str) -> None:
        """Make this node's folder, and delete the copies of runs that were in the run's folder."""
        error = None
        if self._ring.leads:
            try:
                folders.make_copies_folder(base, name, key, identity, "checkpoints")
                folders.remove_leftovers(self.checkpoints)
                for other in self.checkpoints.parents[1].iterdir():
                    if IDENTITY.fullmatch(other.name) and other.name != identity:
                        discard(other)
            except UserError as failed:
                error = str(failed)
            except OSError as failed:
                where = failed.filename or self.checkpoints
                error = f"checkpoint.emergency_dir: node {name}: {failed.strerror}: {where}"
        self._ring.raise_together(error)

    def write(
        self,
        manifest: Manifest,
        tensors: Sequence[torch.Tensor],
        entries: Sequence[Sequence[Entry]],
    ) -> int:
        """Make a copy; its size in bytes. `entries` are needed on rank 0 alone.

        For a thread beside training: it sends over a group of its own. Raises OSError, on every
        rank, where a node could not write or what was sent arrived changed.
        """
        step = manifest.position.step
        folder = self.checkpoints / f"{UNFINISHED}{folders.name_of(step)}"
        try:
            return self._write(folder, manifest, tensors, entries)
        except BaseException:
            discard(folder)
            raise

    def _write(
        self,
        folder: Path,
        manifest: Manifest,
        tensors: Sequence[torch.Tensor],
        entries: Sequence[Sequence[Entry]],
    ) -> int:
        written = _attempt(lambda: write_tensors(folder, self._ranks.rank, tensors))
        error = written if isinstance(written, str) else None
        got = self._ring.swap(folder, written if isinstance(written, Written) else None)
        told = self._ring.gather((written, got or error))
        reports = [report for report, _ in told if isinstance(report, Written)]
        self._ring.require_success([trouble for _, trouble in told])
        error = _attempt(lambda: self._publish(folder, manifest, entries, reports))
        self._ring.require_success(self._ring.gather(error))
        return sum(report.sum.bytes for report in reports)

    def _publish(
        self,
        folder: Path,
        manifest: Manifest,
        entries: Sequence[Sequence[Entry]],
        reports: Sequence[Written],
    ) -> None:
        """On every node: what describes the files, then the name of a copy; older ones go."""
        told: list[Any] = [None]
        if self._ranks.rank == 0:
            told = [_attempt(lambda: _describe(folder, manifest, entries, reports))]
        dist.broadcast_object_list(told, 0, group=self._ring.group)
        if isinstance(told[0], str):
            raise OSError(told[0])
        if not self._ring.leads:
            return
        for name, content in told[0].items():
            write_file(folder / name, content, synced=True)
        sync_folder(folder)
        step = manifest.position.step
        folders.publish(self.checkpoints, step)
        old = [one for one in folders.steps_in(self.checkpoints) if one <= step][:-KEPT]
        folders.remove_steps(self.checkpoints, old)

    def find(self, newer_than: int) -> tuple[Found | None, list[str]]:
        """(the newest copy whose files are all good, what is wrong with newer ones).

        The same on every rank. Its folder on this node may lack files, which are brought when the
        state is restored.
        """
        here = folders.steps_in(self.checkpoints)
        steps = {step for seen in self._ring.gather(here) for step in seen if step > newer_than}
        warnings: list[str] = []
        for step in sorted(steps, reverse=True):
            manifest, lacking, faults = self._inspect(step)
            warnings += faults
            if manifest is not None:
                bring = Bring(
                    self._ring, self.checkpoints / folders.name_of(step), manifest, lacking
                )
                bring({name for name in manifest.files if not name.endswith(".distcp")})
                return Found(bring.folder, manifest, tuple(warnings), bring), warnings
        return None, warnings

    def _inspect(self, step: int) -> tuple[Manifest | None, frozenset[str], list[str]]:
        """(the manifest of a copy if all nodes together hold it, what this node lacks of it, what
        is wrong). The ranks of a node share the reading."""
        folder = self.checkpoints / folders.name_of(step)
        try:
            own: Manifest | None = Manifest.read(folder)
        except UserError:
            own = None
        manifests = self._ring.gather(own)
        manifest = next((one for one in manifests if one is not None), None)
        if manifest is None:
            return None, frozenset(), [f"emergency copy of step {step}: no node has its manifest"]
        names = sorted(manifest.files)
        share = names[self._ring.place :: len(self._ring.nodes[self._ring.mine])]
        faults = {one.file: one.what for one in verify(folder, manifest, share)}
        told = self._ring.gather(faults)
        lacking = [
            frozenset(name for rank in ranks for name in told[rank]) for ranks in self._ring.nodes
        ]
        damaged = [
            f"emergency copy of step {step} on node {self._ring.hosts[rank]}: {name}: {what}"
            for rank, seen in enumerate(told)
            for name, what in seen.items()
            if what != "missing"
        ]
        lost = frozenset.intersection(*lacking)
        if lost:
            lines = [f"emergency copy of step {step}: {min(lost)} is good on no node"]
            return None, frozenset(), [*damaged[:3], *lines]
        return manifest, lacking[self._ring.mine], damaged[:3]

    def forget_after(self, step: int) -> None:
        """Drop the copies of a future that the run goes back from; -1: all of them."""
        if self._ring.leads:
            with contextlib.suppress(OSError):
                later = [one for one in folders.steps_in(self.checkpoints) if one > step]
                folders.remove_steps(self.checkpoints, later)
        dist.barrier(group=self._ring.group)


def _attempt(work: Callable[[], Any]) -> Any:
    """What `work` gives, or in one line why it failed."""
    try:
        return work()
    except OSError as error:
        return error.strerror or one_line(error)


def _describe(
    folder: Path,
    manifest: Manifest,
    entries: Sequence[Sequence[Entry]],
    reports: Sequence[Written],
) -> dict[str, bytes]:
    """Write what describes the data files; these files, the manifest last."""
    files = write_index(folder, entries, reports)
    replace(manifest, files=files).write(folder)
    small = sorted(files.keys() - {report.file for report in reports})
    return {name: (folder / name).read_bytes() for name in [*small, MANIFEST]}


@dataclass(frozen=True)
class Bring:
    """Brings files of one copy to this node when they are to be read; all ranks call it."""

    ring: NodeRing
    folder: Path
    manifest: Manifest
    lacking: frozenset[str]

    def __call__(self, wanted: set[str]) -> None:
        """`wanted` are those that this rank reads. Raises UserError on every rank."""
        self.ring.fetch(self.folder, self.manifest, set(wanted), set(self.lacking))
