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
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megascale.checkpoint import folder as folders
from megascale.checkpoint.load import Found
from megascale.checkpoint.manifest import MANIFEST, Manifest, sum_file, verify
from megascale.checkpoint.storage import Entry, Written, one_line, write_index, write_tensors
from megascale.errors import UserError
from megascale.reading import MOST_TEXT_BYTES, read_whole
from megascale.runtime.distributed import TIMEOUT, Ranks
from megascale.runtime.files import (
    UNFINISHED,
    discard,
    sync_folder,
    whole_file,
    write_file,
)
from megascale.runtime.first_rank import from_first_rank
from megascale.runtime.placement import members_of, node_name

IDENTITY = re.compile("[0-9a-f]{32}")
KEPT = 2
"""Copies of a node: while the newest is made, the one before it must be whole on all of them."""
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class _Peers:
    """Who holds what of whom."""

    nodes: tuple[tuple[int, ...], ...]
    """Ranks of each node, in ring order."""
    mine: int
    """Which of them is this rank's."""
    place: int
    """Of this rank in its node."""

    @property
    def after(self) -> int:
        """The rank that holds this one's file too; itself on a single node."""
        return self.nodes[(self.mine + 1) % len(self.nodes)][self.place]

    @property
    def before(self) -> int:
        """The rank whose file this one holds too."""
        return self.nodes[self.mine - 1][self.place]


class Emergency:
    """The copies of one run, as one rank sees them. All ranks call all methods."""

    def __init__(self, run_dir: str | Path, directory: str, ranks: Ranks, anew: bool) -> None:
        """`anew`: the run leaves behind what it was, and all copies of it, also those of nodes
        that are not here now.

        Raises UserError, on every rank, where nodes have unequal numbers of ranks or a node
        cannot write to its directory."""
        self._ranks, name = ranks, node_name()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        hosts = self._gather(name)
        nodes = tuple(tuple(ranks) for ranks in members_of(hosts))
        if len({len(one) for one in nodes}) > 1:
            raise UserError("checkpoint.emergency_dir needs equally many ranks on every node")
        mine = next(number for number, one in enumerate(nodes) if ranks.rank in one)
        self._hosts, self._nodes = hosts, nodes
        self._peers = _Peers(nodes, mine, nodes[mine].index(ranks.rank))
        run = Path(run_dir).resolve()
        key = folders.copies_name(run)
        identity = self._identity(folders.checkpoints_dir(run), anew)
        self.checkpoints = Path(directory) / name / key / identity / "checkpoints"
        self._prepare(Path(directory), name, key, identity)

    @property
    def _leads(self) -> bool:
        """This rank does for its node what one must do."""
        return self._peers.place == 0

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
        if self._leads:
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
        self._raise_together(error)

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
        written = self._attempt(lambda: write_tensors(folder, self._ranks.rank, tensors))
        error = written if isinstance(written, str) else None
        got = self._swap(folder, written if isinstance(written, Written) else None)
        told = self._gather((written, got or error))
        reports = [report for report, _ in told if isinstance(report, Written)]
        self._check([trouble for _, trouble in told])
        error = self._attempt(lambda: self._publish(folder, manifest, entries, reports))
        self._check(self._gather(error))
        return sum(report.sum.bytes for report in reports)

    def _swap(self, folder: Path, mine: Written | None) -> str | None:
        """Send this rank's file to the next node and receive that of the one before; what failed.

        A rank without a file sends none, so that nobody waits for it.
        """
        if len(self._nodes) == 1:
            return None
        head = torch.tensor([mine.sum.bytes if mine else -1])
        about = torch.empty_like(head)
        sent = dist.isend(head, self._peers.after, group=self._group)
        dist.recv(about, self._peers.before, group=self._group)
        assert sent is not None, "this rank is in the group"
        sent.wait()
        target = folder / f"__{self._peers.before}_0.distcp"
        size_out, size_in, error = int(head), int(about), None
        with contextlib.ExitStack() as stack:
            source = stack.enter_context((folder / mine.file).open("rb")) if mine else None
            try:
                folder.mkdir(exist_ok=True)
                sink = stack.enter_context(target.open("wb")) if size_in >= 0 else None
            except OSError as refused:
                sink, error = None, refused.strerror
            while size_out > 0 or size_in > 0:
                size_out, size_in, failed = self._swap_chunk(source, sink, size_out, size_in)
                error = error or failed
            if sink is not None and error is None:
                sink.flush()
                os.fsync(sink.fileno())
        return error

    def _swap_chunk(
        self, source: Any, sink: Any, size_out: int, size_in: int
    ) -> tuple[int, int, str | None]:
        """One chunk each way; (bytes left to send, to receive, what failed)."""
        sent, error = None, None
        if size_out > 0:
            block = source.read(CHUNK_BYTES)
            block = block.ljust(min(CHUNK_BYTES, size_out), b"\0")  # should the file be cut short
            chunk = torch.frombuffer(bytearray(block), dtype=torch.uint8)
            sent = dist.isend(chunk, self._peers.after, group=self._group)
            size_out -= len(block)
        if size_in > 0:
            buffer = torch.empty(min(CHUNK_BYTES, size_in), dtype=torch.uint8)
            dist.recv(buffer, self._peers.before, group=self._group)
            size_in -= buffer.numel()
            try:
                if sink is not None:
                    sink.write(buffer.numpy().tobytes())
            except OSError as failed:
                error = failed.strerror
        if sent is not None:
            sent.wait()
        return size_out, size_in, error

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
            told = [self._attempt(lambda: _describe(folder, manifest, entries, reports))]
        dist.broadcast_object_list(told, 0, group=self._group)
        if isinstance(told[0], str):
            raise OSError(told[0])
        if not self._leads:
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
        steps = {step for seen in self._gather(here) for step in seen if step > newer_than}
        warnings: list[str] = []
        for step in sorted(steps, reverse=True):
            manifest, lacking, faults = self._inspect(step)
            warnings += faults
            if manifest is not None:
                bring = Bring(self, self.checkpoints / folders.name_of(step), manifest, lacking)
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
        manifests = self._gather(own)
        manifest = next((one for one in manifests if one is not None), None)
        if manifest is None:
            return None, frozenset(), [f"emergency copy of step {step}: no node has its manifest"]
        names = sorted(manifest.files)
        share = names[self._peers.place :: len(self._nodes[self._peers.mine])]
        faults = {one.file: one.what for one in verify(folder, manifest, share)}
        told = self._gather(faults)
        lacking = [
            frozenset(name for rank in ranks for name in told[rank]) for ranks in self._nodes
        ]
        damaged = [
            f"emergency copy of step {step} on node {self._hosts[rank]}: {name}: {what}"
            for rank, seen in enumerate(told)
            for name, what in seen.items()
            if what != "missing"
        ]
        lost = frozenset.intersection(*lacking)
        if lost:
            lines = [f"emergency copy of step {step}: {min(lost)} is good on no node"]
            return None, frozenset(), [*damaged[:3], *lines]
        return manifest, lacking[self._peers.mine], damaged[:3]

    def fetch(self, folder: Path, manifest: Manifest, wanted: set[str], lacking: set[str]) -> None:
        """Bring files to this node, each once, from a node that has them good.

        Raises UserError on every rank where one does not arrive as the manifest says.
        """
        asked = self._gather((sorted(wanted & lacking), sorted(lacking)))
        lacks = [set(asked[ranks[0]][1]) for ranks in self._nodes]
        error = None
        for ranks in self._nodes:
            for name in sorted({name for rank in ranks for name in asked[rank][0]}):
                holder = next(other for other, some in enumerate(lacks) if name not in some)
                place = xxhash.xxh3_64_intdigest(name.encode()) % len(ranks)
                sender, receiver = self._nodes[holder][place], ranks[place]
                try:
                    if self._ranks.rank == sender:
                        self._send(folder / name, receiver)
                    elif self._ranks.rank == receiver:
                        self._receive(folder, name, sender, manifest)
                except (OSError, UserError) as failed:
                    error = f"emergency copy {folder}: {name}: {one_line(failed)}"
        self._raise_together(error)

    def _send(self, path: Path, receiver: int) -> None:
        left = path.stat().st_size
        dist.send(torch.tensor([left]), receiver, group=self._group)
        with path.open("rb") as source:
            while block := source.read(CHUNK_BYTES):
                chunk = torch.frombuffer(bytearray(block), dtype=torch.uint8)
                dist.send(chunk, receiver, group=self._group)

    def _receive(self, folder: Path, name: str, sender: int, manifest: Manifest) -> None:
        blocks = self._blocks(sender)
        try:
            folder.mkdir(exist_ok=True)
            with whole_file(folder / name) as sink:
                sink.writelines(blocks)
                sink.flush()
                if sum_file(Path(sink.name)) != manifest.files[name]:
                    raise UserError("its checksum differs from the manifest")
        finally:
            deque(blocks, maxlen=0)  # the sender waits until all of it is taken

    def _blocks(self, sender: int) -> Iterator[bytes]:
        """What a rank sends of a file."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, sender, group=self._group)
        left = int(size)
        while left > 0:
            buffer = torch.empty(min(CHUNK_BYTES, left), dtype=torch.uint8)
            dist.recv(buffer, sender, group=self._group)
            left -= buffer.numel()
            yield buffer.numpy().tobytes()

    def forget_after(self, step: int) -> None:
        """Drop the copies of a future that the run goes back from; -1: all of them."""
        if self._leads:
            with contextlib.suppress(OSError):
                later = [one for one in folders.steps_in(self.checkpoints) if one > step]
                folders.remove_steps(self.checkpoints, later)
        dist.barrier(group=self._group)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, or in one line why it failed."""
        try:
            return work()
        except OSError as error:
            return error.strerror or one_line(error)

    def _check(self, troubles: Sequence[str | None]) -> None:
        for rank, trouble in enumerate(troubles):
            if trouble:
                raise OSError(f"rank {rank} on node {self._hosts[rank]}: {trouble}")

    def _gather(self, mine: Any) -> list[Any]:
        told: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(told, mine, group=self._group)
        return told

    def _raise_together(self, error: str | None) -> None:
        errors = [one for one in self._gather(error) if one is not None]
        if errors:
            raise UserError(errors[0])


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

    emergency: Emergency
    folder: Path
    manifest: Manifest
    lacking: frozenset[str]

    def __call__(self, wanted: set[str]) -> None:
        """`wanted` are those that this rank reads. Raises UserError on every rank."""
        self.emergency.fetch(self.folder, self.manifest, set(wanted), set(self.lacking))
