"""The lengths of each step's sequences, drawn from a distribution, a corpus or a file."""

from __future__ import annotations

from functools import partial

from megascale.arrays import Integers
from megascale.errors import UserError
from megascale.simulate.lengths import draw_lengths, given_documents, sample_lengths

MOST_SEQUENCES = 2**21
"""Of all steps, which are in memory together."""
MOST_OF_A_STEP = 2**18
"""Six times those of 256M tokens of ByteScale; planners take a minute for more."""


def step_lengths(spec: str, tokens: int, context: int, steps: int, seed: int) -> list[Integers]:
    """Lengths of each step's sequences, `tokens` a step, cut at `context`.

    `spec` is the name of a distribution, corpus:PATH, file:PATH or the path of a file. Raises
    UserError where it is none of them, and for more than MOST_SEQUENCES or
    MOST_OF_A_STEP.
    """
    documents = given_documents(spec, "--lengths ")
    draw = partial(draw_lengths, spec) if documents is None else partial(sample_lengths, documents)
    batches: list[Integers] = []
    for step in range(steps):
        batches.append(draw(tokens, context, seed * 1_000_003 + step))
        if len(batches[-1]) > MOST_OF_A_STEP:
            raise UserError(
                f"--batch-tokens {tokens}: {len(batches[-1]):,} sequences in a step are more than "
                f"{MOST_OF_A_STEP:,}; give fewer tokens"
            )
        if sum(map(len, batches)) > MOST_SEQUENCES:
            raise UserError(
                f"--steps {steps} --batch-tokens {tokens}: more than {MOST_SEQUENCES:,} sequences "
                f"by step {step}; give fewer steps or tokens"
            )
    return batches
