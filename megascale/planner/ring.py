"""One micro-batch of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]
"""Tokens [begin, end) of a sequence."""


class PlanError(AssertionError):
    """A plan breaks its own rules: the mistake of a planner, never of a user."""


def kept_share(offload: float, stage_layers: int) -> float:
    """Part of the activations that stays on the device when `offload` of them may leave.

    The first and the last layer of a stage never offload (ByteScale, Eq. 3).
    """
    layers = max(2, stage_layers)
    return (2 + (1 - offload) * (layers - 2)) / layers


@dataclass(frozen=True)
class Ring:
    """One micro-batch: sequences computed together by a set of ranks.

    The sequences are whole, or the micro-batch is a chunk. The chunks of a group have the same
    ranks, in the same order, and follow each other as micro-batches. Each computes a range of
    tokens of some sequences. Its tokens attend to those that earlier chunks of the group have
    computed, whose keys and values stay on the ranks that computed them.
    """

    id: int
    """Increasing in execution order; every rank runs its rings in this order."""
    ranks: tuple[int, ...]
    """Ranks of the HDP axis that share each of the sequences, or of their ranges, equally."""
    sequences: tuple[int, ...]
    """Indices into the step's lengths; none means a padding micro-batch."""
    offload: float
    """Part of the activations of all layers but two that is kept in host memory, 0 to 1."""
    index: int
    """Number of the micro-batch on its ranks."""
    group: int | None = None
    """Id of the first ring of its group of chunks; None: its sequences are whole."""
    chunk: int = 0
    """Its place among the chunks of the group, from 0, in causal order."""
    chunks: int = 1
    """Chunks of the group; 1: its sequences are whole."""
    spans: tuple[Span, ...] = ()
    """Of a chunk, the tokens [begin, end) that it computes of each of its sequences."""

    def token_spans(self, lengths: Sequence[int]) -> list[Span]:
        """Tokens [begin, end) of each of its sequences, for sequences of `lengths` tokens."""
        if self.chunks > 1:
            return list(self.spans)
        return [(0, int(lengths[sequence])) for sequence in self.sequences]

    def num_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that all its ranks together compute."""
        return sum(end - begin for begin, end in self.token_spans(lengths))

    def to_json(self) -> dict[str, Any]:
        """The ring as plain values. Whole sequences have no fields of chunks."""
        values = dict(vars(self))
        if (self.group, self.chunk, self.chunks, self.spans) == WHOLE:
            for name in CHUNK_FIELDS:
                del values[name]
        return values

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Ring:
        """Inverse of `to_json`, also after a round trip through JSON text.

        Raises PlanError for a field that is missing, unknown, or of another kind.
        """
        try:
            tuples = {
                "ranks": tuple(value["ranks"]),
                "sequences": tuple(value["sequences"]),
                "spans": tuple((begin, end) for begin, end in value.get("spans", ())),
            }
            ring = Ring(**{**value, **tuples})
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"no ring can be read from {str(dict(value))[:120]}: {error}") from None
        numbers = (ring.id, ring.index, ring.chunk, ring.chunks, *ring.ranks, *ring.sequences)
        ends = (end for span in ring.spans for end in span)
        if not all(type(one) is int for one in (*numbers, *ends, ring.group or 0)):
            raise PlanError(f"ring {ring.id!r:.40} has a number that is not whole: {ring!s:.200}")
        if not isinstance(ring.offload, (int, float)):
            raise PlanError(f"ring {ring.id} offloads {ring.offload!r:.40}")
        return ring


CHUNK_FIELDS = ("group", "chunk", "chunks", "spans")
WHOLE = (None, 0, 1, ())
"""Their values where sequences are whole."""
