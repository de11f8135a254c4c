"""The nodes of a run in a ring, and the files of emergency copies that go from node to node."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megascale.checkpoint.manifest import Manifest, sum_file
from megascale.checkpoint.storage import Written, one_line
from megascale.errors import UserError
from megascale.runtime.distributed import TIMEOUT, Ranks
from megascale.runtime.files import whole_file
from megascale.runtime.placement import members_of, node_name

CHUNK_BYTES = 1 << 24


class NodeRing:
    """The nodes in ring order, as one rank sees them. All ranks call all methods."""

    def __init__(self, ranks: Ranks) -> None:
        """Raises UserError, on every rank, where nodes have unequal numbers of ranks."""
        self._ranks = ranks
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        """All ranks, for messages of emergency copies alone."""
        self.hosts: list[str] = self.gather(node_name())
        """Name of each rank's node."""
        self.nodes = tuple(tuple(ranks) for ranks in members_of(self.hosts))
        """Ranks of each node, in ring order."""
        if len({len(one) for one in self.nodes}) > 1:
            raise UserError("checkpoint.emergency_dir needs equally many ranks on every node")
        self.mine = next(i for i, node in enumerate(self.nodes) if ranks.rank in node)
        """Which of them is this rank's."""
        self.place = self.nodes[self.mine].index(ranks.rank)
        """Place of this rank in its node."""

    @property
    def leads(self) -> bool:
        """Whether this rank does for its node what one of its ranks must do."""
        return self.place == 0

    @property
    def after(self) -> int:
        """The rank that holds this one's file too; itself on a single node."""
        return self.nodes[(self.mine + 1) % len(self.nodes)][self.place]

    @property
    def before(self) -> int:
        """The rank whose file this one holds too."""
        return self.nodes[self.mine - 1][self.place]

    def gather(self, mine: Any) -> list[Any]:
        """What each rank gives, in the order of ranks."""
        told: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(told, mine, group=self.group)
        return told

    def require_success(self, troubles: Sequence[str | None]) -> None:
        """Raise OSError for the first rank that has trouble; `troubles` has one entry a rank."""
        for rank, trouble in enumerate(troubles):
            if trouble:
                raise OSError(f"rank {rank} on node {self.hosts[rank]}: {trouble}")

    def raise_together(self, error: str | None) -> None:
        """Raise UserError on every rank where one of them has an error."""
        errors = [one for one in self.gather(error) if one is not None]
        if errors:
            raise UserError(errors[0])

    def swap(self, folder: Path, mine: Written | None) -> str | None:
        """Send this rank's file to the next node and receive that of the one before; what failed.

        A rank without a file sends none, so that nobody waits for it.
        """
        if len(self.nodes) == 1:
            return None
        head = torch.tensor([mine.sum.bytes if mine else -1])
        about = torch.empty_like(head)
        sent = dist.isend(head, self.after, group=self.group)
        dist.recv(about, self.before, group=self.group)
        assert sent is not None, "this rank is in the group"
        sent.wait()
        target = folder / f"__{self.before}_0.distcp"
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
            sent = dist.isend(chunk, self.after, group=self.group)
            size_out -= len(block)
        if size_in > 0:
            buffer = torch.empty(min(CHUNK_BYTES, size_in), dtype=torch.uint8)
            dist.recv(buffer, self.before, group=self.group)
            size_in -= buffer.numel()
            try:
                if sink is not None:
                    sink.write(buffer.numpy().tobytes())
            except OSError as failed:
                error = failed.strerror
        if sent is not None:
            sent.wait()
        return size_out, size_in, error

    def fetch(self, folder: Path, manifest: Manifest, wanted: set[str], lacking: set[str]) -> None:
        """Bring files to this node, each once, from a node that has them good.

        Raises UserError on every rank where one does not arrive as the manifest says.
        """
        asked = self.gather((sorted(wanted & lacking), sorted(lacking)))
        lacks = [set(asked[ranks[0]][1]) for ranks in self.nodes]
        error = None
        for ranks in self.nodes:
            for name in sorted({name for rank in ranks for name in asked[rank][0]}):
                holder = next(other for other, some in enumerate(lacks) if name not in some)
                place = xxhash.xxh3_64_intdigest(name.encode()) % len(ranks)
                sender, receiver = self.nodes[holder][place], ranks[place]
                try:
                    if self._ranks.rank == sender:
                        self._send(folder / name, receiver)
                    elif self._ranks.rank == receiver:
                        self._receive(folder, name, sender, manifest)
                except (OSError, UserError) as failed:
                    error = f"emergency copy {folder}: {name}: {one_line(failed)}"
        self.raise_together(error)

    def _send(self, path: Path, receiver: int) -> None:
        left = path.stat().st_size
        dist.send(torch.tensor([left]), receiver, group=self.group)
        with path.open("rb") as source:
            while block := source.read(CHUNK_BYTES):
                chunk = torch.frombuffer(bytearray(block), dtype=torch.uint8)
                dist.send(chunk, receiver, group=self.group)

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
        dist.recv(size, sender, group=self.group)
        left = int(size)
        while left > 0:
            buffer = torch.empty(min(CHUNK_BYTES, left), dtype=torch.uint8)
            dist.recv(buffer, sender, group=self.group)
            left -= buffer.numel()
            yield buffer.numpy().tobytes()
