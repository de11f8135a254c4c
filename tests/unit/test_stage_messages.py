"""Messages between stages: two neighbours begin the same ones in the same order."""

from hypothesis import given
from hypothesis import strategies as st

from megascale.planner.chunk_order import pipeline_order, stage_order
from megascale.training.stage_messages import StageMessages, messages_of


class Work:
    """A message that is on its way for ever."""

    def is_completed(self):
        return False

    def wait(self):
        return True


class Neighbours:
    """Notes what is begun, in order."""

    def __init__(self):
        self.begun = []

    def send_forward_recv_forward(self, tensor, receives, shape, overlap_p2p_comm):
        return self._begin(False, tensor, shape)

    def send_backward_recv_backward(self, tensor, receives, shape, overlap_p2p_comm):
        return self._begin(True, tensor, shape)

    def _begin(self, backward, tensor, shape):
        index = tensor if shape is None else shape
        self.begun.append((backward, index, shape is None))
        return index, {"work": Work()}


def begun_on(waves, stages, stage):
    """(is backward, micro-batch, is sent here) of all that a stage begins, in order."""
    messages = messages_of(pipeline_order(tuple(waves), stages), stages, stage)
    made = StageMessages([], None, lambda index: index)
    made._waiting.extend(messages)
    made._neighbours = Neighbours()
    for backward, index in stage_order(waves, stages, stage):
        before, after = (stage + 1, stage - 1) if backward else (stage - 1, stage + 1)
        if 0 <= before < stages:
            assert made.receive(backward, index) == index
        if 0 <= after < stages:
            made.send(backward, index, index)
    assert not made._waiting and not made._coming
    made.finish()
    return made._neighbours.begun


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(2, 6))
def test_neighbours_begin_the_same_messages_in_the_same_order(waves, stages):
    """So a device that works on one message at a time finishes them all."""
    begun = [begun_on(waves, stages, stage) for stage in range(stages)]
    for stage in range(stages - 1):
        mine = [(b, i) for b, i, sent in begun[stage] if b != sent]  # to and from the stage after
        theirs = [(b, i) for b, i, sent in begun[stage + 1] if b == sent]
        assert mine == theirs and len(mine) == 2 * sum(waves)
