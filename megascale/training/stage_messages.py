"""Messages between the stages of a pipeline, in an order that all stages share.

All stages know all passes of a plan. Every message has a place in one order of them: that of the
pass that makes it. A stage begins its messages in this order, and receives before their turn where
that keeps it. So two neighbours begin the same messages in the same order, also on a device that
works on one message at a time, and no order of passes that `pipeline_order` can finish is a
deadlock.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class Message(NamedTuple):
    """The activations of a micro-batch, or their gradients, as one stage sees them."""

    backward: bool
    """Gradients, which go to the stage before."""
    number: int
    """The micro-batch."""
    outgoing: bool
    """This stage sends it."""


def messages_of(passes: Sequence[tuple[int, bool, int]], stages: int, stage: int) -> list[Message]:
    """The messages of `stage`, in the order of `passes` (see `pipeline_order`)."""
    messages = []
    for sender, backward, index in passes:
        receiver = sender - 1 if backward else sender + 1
        if 0 <= receiver < stages and stage in (sender, receiver):
            messages.append(Message(backward, index, stage == sender))
    return messages


class StageMessages:
    """What a stage sends to its neighbours and gets from them in one step."""

    def __init__(
        self,
        messages: Sequence[Message],
        config: Any,
        shape_of: Callable[[int], tuple[int, int, int]],
    ) -> None:
        """`messages` are all of this stage, in order; `config` is megatron-core's of the model.

        `shape_of` gives the shape of a micro-batch's activations, so that no shape is sent.
        """
        self._waiting, self._shape_of = deque(messages), shape_of
        self._coming: dict[Message, tuple[torch.Tensor, list[dist.Work]]] = {}
        self._going: list[tuple[torch.Tensor, list[dist.Work]]] = []
        if messages:
            config = copy.copy(config)
            config.variable_seq_lengths = config.batch_p2p_comm = False
            group = parallel_state.get_pipeline_model_parallel_group()
            self._neighbours = P2PCommunicator(group, config)

    def send(self, backward: bool, index: int, tensor: torch.Tensor) -> None:
        """Begin to send; the pass that made `tensor` has just run."""
        message = Message(backward, index, True)
        self._begin_receiving_before(message)
        self._waiting.popleft()
        self._going = [pair for pair in self._going if not _is_done(pair[1])]
        self._going.append((tensor, self._begin(message, tensor)[1]))

    def receive(self, backward: bool, index: int) -> torch.Tensor:
        """Wait for a tensor, which the next pass needs."""
        message = Message(backward, index, False)
        if message not in self._coming:
            self._begin_receiving_before(message)
            self._coming[self._waiting.popleft()] = self._begin(message, None)
        tensor, works = self._coming.pop(message)
        for work in works:
            work.wait()
        return tensor

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for _, works in self._going:
            for work in works:
                work.wait()
        self._going.clear()

    def _begin_receiving_before(self, message: Message) -> None:
        while self._waiting[0] != message:
            coming = self._waiting.popleft()
            assert not coming.outgoing, f"{coming} has its turn before {message}"
            self._coming[coming] = self._begin(coming, None)

    def _begin(
        self, message: Message, tensor: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[dist.Work]]:
        """Begin to send `tensor`, or to receive into the tensor returned."""
        shape = None if message.outgoing else self._shape_of(message.number)
        ways = self._neighbours
        exchange = (
            ways.send_backward_recv_backward if message.backward else ways.send_forward_recv_forward
        )
        coming, works = exchange(tensor, not message.outgoing, shape, overlap_p2p_comm=True)
        return coming, list(works.values())


def _is_done(works: Sequence[dist.Work]) -> bool:
    return all(work.is_completed() for work in works)
