"""The learning rate: a pure function of the tokens seen and a list of segments.

No state, so a resumed run is at the right rate whatever a checkpoint was saved with, and a
changed schedule holds from the next step on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megascale.config.schema import SegmentConfig


def lr_at(tokens_seen: int, segments: Sequence[SegmentConfig]) -> float:
    """Learning rate once `tokens_seen` loss tokens have been seen.

    A step uses the rate at the tokens seen including its own batch: then a warm-up from 0 does
    not waste its first step at rate 0, and the last step has the rate of the schedule's end.

    Each segment starts from the end of the one before it (the first one from 0) and ends at its
    own `lr`: `linear` on a straight line, `cosine` on half a wave, `inverse_sqrt` as
    1/sqrt(1 + a x), `exponential` by equal factors, while `constant` holds its `lr` throughout
    (arXiv 2403.08763). A joint belongs to the segment that ends there. Beyond the end
    the last rate holds.
    """
    begin, begin_lr = 0, 0.0
    for segment in segments:
        end = math.inf if segment.tokens is None else begin + segment.tokens
        if tokens_seen <= end:
            return _inside(segment, (tokens_seen - begin) / (end - begin), begin_lr)
        begin, begin_lr = int(end), segment.lr
    return begin_lr


def _inside(segment: SegmentConfig, done: float, begin_lr: float) -> float:
    """Rate at the part `done`, 0 to 1, of a segment."""
    if segment.shape == "constant":
        return segment.lr
    if segment.shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    elif segment.shape == "inverse_sqrt":
        done = _fallen(segment.timescale * done) / _fallen(segment.timescale)
    elif segment.shape == "exponential":
        return float(begin_lr ** (1 - done) * segment.lr**done)
    return begin_lr * (1 - done) + segment.lr * done


def _fallen(x: float) -> float:
    """How far 1/sqrt(1 + x) has fallen from its 1 at x = 0."""
    return 1 - 1 / math.sqrt(1 + x)


def joints(segments: Sequence[SegmentConfig]) -> list[tuple[int, float]]:
    """(tokens seen, learning rate) at the start and at the end of every segment that ends."""
    points, end = [(0, lr_at(0, segments))], 0
    for segment in segments:
        if segment.tokens is not None:
            end += segment.tokens
            points.append((end, lr_at(end, segments)))
    return points
