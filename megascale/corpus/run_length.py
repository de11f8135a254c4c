"""How long a run is: the steps it takes, the tokens it reads, and when it is over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megascale.arrays import Floats
from megascale.config.schema import DataConfig, TrainConfig
from megascale.corpus.batches import (
    Cursor,
    GlobalBatches,
    SourceCursor,
    shares,
    stage_at,
    stage_ends,
    used_sources,
)

MOST_STEPS, MOST_PIECES = 1000, 100_000
"""Runs up to this size are dealt to the end to know their length; that takes half a second."""


RAMP_PARTS = 64
"""Of a batch ramp, in each of which an estimate takes batches as equal."""


def is_over(cursor: Cursor, train: TrainConfig) -> bool:
    """Whether a run ends here: its last step is the one that reaches `train.tokens`."""
    stop = train.stop_after_steps
    return cursor.tokens_seen >= train.tokens or (stop is not None and cursor.step >= stop)


@dataclass(frozen=True)
class RunLength:
    """From one cursor of a run to the end of the step that reaches its tokens."""

    steps: Floats
    """Steps of the run at some moments, rising: of every step where the run was dealt, else at the
    ends of its stages."""
    tokens: Floats
    """Loss tokens of the run at these moments."""
    stages: tuple[int, ...]
    """Indices of the stages that have a step."""
    read: Mapping[str, int]
    """Tokens of each source that the run has read at its end."""
    end: Cursor | None
    """The last cursor; None where the length is an estimate."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return round(float(self.steps[-1]))

    @property
    def num_tokens(self) -> int:
        """Loss tokens of the whole run, at least those asked for."""
        return round(float(self.tokens[-1]))

    def step_reaching(self, tokens: int) -> int:
        """The number of steps after which `tokens` are reached; at most all."""
        return math.ceil(float(np.interp(tokens, self.tokens, self.steps)))

    def total_steps(self, cursor: Cursor) -> int:
        """Steps of the whole run, as it looks at `cursor`."""
        done = float(np.interp(cursor.tokens_seen, self.tokens, self.steps))
        return cursor.step + math.ceil(float(self.steps[-1]) - done)


def run_length(batches: GlobalBatches, tokens: int, begin: Cursor) -> RunLength:
    """How a run goes on from `begin` to the step that reaches `tokens`.

    Exact for small runs, which are dealt to their end; for others an estimate from the mean length
    of pieces, right to a step in each stage and to the chance in which pieces the run draws.
    Raises UserError where a source is used up before the end.
    """
    about, pieces = _estimated(batches, tokens, begin)
    if about.steps[-1] - begin.step > MOST_STEPS or pieces > MOST_PIECES:
        return about
    cursors = [begin]
    while cursors[-1].tokens_seen < tokens:
        cursors.append(batches.next(cursors[-1])[1])
    end = cursors[-1]
    return RunLength(
        np.array([one.step for one in cursors], np.float64),
        np.array([one.tokens_seen for one in cursors], np.float64),
        tuple(dict.fromkeys(one.stage for one in cursors[1:])),
        {name: one.tokens for name, one in end.sources.items()},
        end,
    )


def _estimated(batches: GlobalBatches, tokens: int, begin: Cursor) -> tuple[RunLength, float]:
    """The length of a run, and the pieces that it reads, about."""
    data, step, seen, pieces = batches.data, float(begin.step), float(begin.tokens_seen), 0.0
    steps, points, stages = [step], [seen], []
    read = {name: float(one.tokens) for name, one in begin.sources.items()}
    while seen < tokens:
        stage = stage_at(int(seen), data.stages)
        end = min([tokens, *stage_ends(data.stages)[stage : stage + 1]])
        grown = _grown(data, seen)
        if grown is not None and grown < end:
            of_step, of_pieces = batches.rates(stage, (seen + grown) / 2)
            count, reached = (grown - seen) / of_step, grown
        else:
            of_step, of_pieces = batches.rates(stage, seen if grown is None else (seen + end) / 2)
            count = math.ceil((end - seen) / of_step)
            reached = seen + count * of_step
        for name, share in shares(data.stages[stage]).items():
            read[name] = read.get(name, 0.0) + float(share) * (reached - seen)
        step, seen, pieces = step + count, reached, pieces + count * of_pieces
        steps.append(step)
        points.append(seen)
        stages.append(stage)
    rounded = {name: round(count) for name, count in read.items()}
    once = tuple(dict.fromkeys(stages))
    return RunLength(np.array(steps), np.array(points), once, rounded, None), pieces


def _grown(data: DataConfig, seen: float) -> float | None:
    """While batches grow, the tokens up to which they are taken as equal; None afterwards."""
    ramp = data.batch_ramp
    if ramp is None or seen >= ramp.over_tokens:
        return None
    part = ramp.over_tokens / RAMP_PARTS
    return float(min(ramp.over_tokens, (seen // part + 1) * part))


def begin_after(length: RunLength) -> Cursor:
    """Where a run begins that goes on in the data of another one, as far as that is known."""
    sources = length.end.sources if length.end is not None else {}
    return Cursor(sources={name: SourceCursor(one.pieces) for name, one in sources.items()})


def most_tokens(data: DataConfig, tokens: int) -> dict[str, int]:
    """The most tokens of each source that a run of `tokens` can read.

    Every step begins before its stage ends, and a source is given what
    its share of the nominal tokens asks for, to the end of the piece. So a source has pieces
    enough in a run if it has these tokens. The run reads fewer by less than a batch and a piece
    for each stage.
    """
    most = dict.fromkeys(used_sources(data.stages), 0)
    batch, begin = data.global_batch_tokens, 0
    ramped = 0 if data.batch_ramp is None else data.batch_ramp.over_tokens
    for stage, end in zip(data.stages, [*stage_ends(data.stages), tokens], strict=True):
        end = min(end, tokens)
        steps = -(-max(0, end - begin) // batch)
        nominal = steps * batch if begin >= ramped else max(0, end - begin - 1) + batch
        nominal *= steps > 0
        for name, share in shares(stage).items() if nominal else ():
            piece = data.context_tokens - 1 if most[name] else 0
            most[name] += math.ceil(share * nominal) + piece
        begin = end
    return most
