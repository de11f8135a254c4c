"""The lengths of each step's sequences, drawn from a distribution, a corpus or a file."""

from __future__ import annotations

from functools import partial

import numpy as np

from megascale.arrays import Integers
from megascale.corpus.shards import Shard
from megascale.corpus.sources import describe
from megascale.errors import UserError
from megascale.simulate.lengths import draw_lengths, read_lengths, sample_lengths

MOST_SEQUENCES = 2**24
"""Of all steps, which are in memory together."""


def step_lengths(spec: str, tokens: int, context: int, steps: int, seed: int) -> list[Integers]:
    """Lengths of each step's sequences, `tokens` a step, cut at `context`.

    `spec` is the name of a distribution, corpus:FOLDER or file:PATH. Raises UserError where it is
    none of them, and for more than MOST_SEQUENCES.
    """
    kind, _, path = spec.partition(":")
    if kind == "corpus":
        draw = partial(sample_lengths, _corpus_lengths(path))
    elif kind == "file":
        draw = partial(sample_lengths, read_lengths(path, "--lengths file:"))
    else:
        draw = partial(draw_lengths, spec)
    batches: list[Integers] = []
    for step in range(steps):
        batches.append(draw(tokens, context, seed * 1_000_003 + step))
        if sum(map(len, batches)) > MOST_SEQUENCES:
            raise UserError(
                f"--steps {steps} --batch-tokens {tokens}: more than {MOST_SEQUENCES:,} sequences "
                f"by step {step}; give fewer steps or tokens"
            )
    return batches


def _corpus_lengths(path: str) -> Integers:
    lengths = Shard.open(describe(path).train).lengths
    return np.asarray(lengths, dtype=np.int64)
