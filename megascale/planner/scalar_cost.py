"""The cost model for one micro-batch at a time: fast for numbers that are no arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

from megascale.planner.cost import CostModel


class Rates(NamedTuple):
    """Seconds of a micro-batch on one kind of ring: start + (rate * tokens + max(attention,
    passing * tokens)) / size, where attention is that of all its sequences on one rank."""

    start_s: float
    rate: float
    passing: float


class Clock:
    """`CostModel.seconds` and its inverse for scalars."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._rates: dict[tuple[int, bool], Rates] = {}

    def rates(self, size: int, one_node: bool) -> Rates:
        """What holds for rings of `size` ranks, within a node or not."""
        rates = self._rates.get((size, one_node))
        if rates is None:
            cost = self._cost
            start_s = cost.fixed + cost.latency * math.log2(size)
            transfer = cost.transfer_intra if one_node else cost.transfer_inter
            passing = (cost.pass_intra if one_node else cost.pass_inter) * (size - 1)
            rates = Rates(start_s, cost.b + transfer * (size > 1), passing)
            self._rates[size, one_node] = rates
        return rates

    def ring_s(self, length: int, size: int, one_node: bool) -> float:
        """Seconds of one sequence alone on a ring."""
        start_s, rate, passing = self.rates(size, one_node)
        return start_s + length * (rate + max(self._cost.a * length, passing)) / size

    def shared_s(self, squares: int, tokens: int, size: int, one_node: bool) -> float:
        """Seconds of sequences that share a ring, by their squared tokens and their tokens."""
        start_s, rate, passing = self.rates(size, one_node)
        return start_s + (tokens * rate + max(self._cost.a * squares, passing * tokens)) / size

    def alone_s(self, tokens: int) -> float:
        """Seconds that a sequence adds to a micro-batch of one rank."""
        return tokens * (self._cost.a * tokens + self._cost.b)

    def tokens_in(self, seconds: float, most: int) -> int:
        """Longest sequence, of at most `most` tokens, that adds at most `seconds` on one rank."""
        if seconds <= 0 or most < 1:
            return 0
        a, b = self._cost.a, self._cost.b
        if a == 0:
            return min(most, int(seconds / b)) if b > 0 else most
        # a t^2 + b t = seconds, solved in the form that does not cancel
        return min(most, int(2 * seconds / (b + math.sqrt(b * b + 4 * a * seconds))))
