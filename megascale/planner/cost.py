"""Seconds that a micro-batch takes, as a function of its lengths and of its ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Floats
from megascale.errors import UserError
from megascale.installation import given_or_example
from megascale.parsing import read_json

FORWARD_SHARE = 1 / 3
"""Part of a micro-batch's time that is forward; backward computes twice as much."""
ASSUMED_FLOPS_PER_S = 1e14
ASSUMED_FIXED_TOKENS = 256
ASSUMED_LATENCY_TOKENS = 64
ASSUMED_INTRA_BYTES_PER_S = 75e9
ASSUMED_INTER_BYTES_PER_S = 10e9

LARGEST = 1_000_000
"""Of any value in a COST.json: seconds beyond it would be days, and overflow."""


@dataclass(frozen=True)
class CostModel:
    """Time of a micro-batch, forward and backward, on a ring of d ranks.

    fixed + latency * log2(d) + (a * sum(s^2) + b * sum(s)) / d + transfer * sum(s) / d
    + max(0, pass * sum(s) * (d - 1) / d - a * sum(s^2) / d), where s are the lengths of its
    sequences in tokens (the shape of ByteScale's and FlexSP's cost models). `transfer` and
    `pass` are those `_intra` where the ring lies within one node, else those `_inter`, and 0
    where d = 1. The last term is what attention does not hide of the keys and values that every
    rank receives from all the others.

    Of a chunk, s is the tokens that it computes. Its attention is that of the causal trapezoid:
    a * (end^2 - begin^2). The keys and values of the tokens before it stay on the ranks that
    computed them, and pass through the ring once more: `pass` counts the chunk's end instead of s,
    and where d > 1 there is a term prefix * sum(begin) / d.
    """

    a: float
    """Seconds per token squared: attention."""
    b: float
    """Seconds per token: everything else."""
    fixed: float = 0.0
    """Seconds per micro-batch."""
    latency: float = 0.0
    """Seconds, times log2 of the ring's size."""
    transfer_intra: float = 0.0
    """Seconds per token that a rank holds, for rings within a node."""
    transfer_inter: float = 0.0
    """Seconds per token that a rank holds, for rings across nodes."""
    node_size: int = 8
    """Consecutive ranks that share a node."""
    pass_intra: float = 0.0
    """Seconds to pass the keys and values of one token on to the next rank, forward and backward,
    within a node; hidden behind attention as far as that lasts."""
    pass_inter: float = 0.0
    """The same, for rings across nodes."""
    prefix_intra: float = 0.0
    """Seconds, per token before a chunk that a rank holds, for what attention does not hide of
    passing its keys and values on again, for rings within a node."""
    prefix_inter: float = 0.0
    """The same, for rings across nodes."""
    calibrated: bool = True
    """False where the rate is assumed: then only ratios of times mean anything."""

    @staticmethod
    def from_flops(
        flops_per_token: float, flops_per_token_squared: float, passed_bytes: float = 0.0
    ) -> CostModel:
        """A model from operation counts, forward and backward, of one sequence.

        `passed_bytes` are those of one token's keys and values, and of their gradients, that a
        rank passes on. All rates are assumed, and so is what starting a micro-batch or a ring
        takes (in tokens that could be computed meanwhile), so times are uncalibrated.
        """
        b = flops_per_token / ASSUMED_FLOPS_PER_S
        return CostModel(
            a=flops_per_token_squared / ASSUMED_FLOPS_PER_S,
            b=b,
            fixed=ASSUMED_FIXED_TOKENS * b,
            latency=ASSUMED_LATENCY_TOKENS * b,
            pass_intra=passed_bytes / ASSUMED_INTRA_BYTES_PER_S,
            pass_inter=passed_bytes / ASSUMED_INTER_BYTES_PER_S,
            calibrated=False,
        )

    @staticmethod
    def load(path: str | Path) -> CostModel:
        """Read a COST.json: an object with the fields above, `calibrated` excepted.

        The `pass_` and `prefix_` fields may be left out. What passes through a ring once more then
        takes as long as the first time: `prefix_` is `transfer_`.

        Raises UserError for an unreadable file, a key that is unknown or missing, and a value
        that is no number from 0 to 1e6 (of `node_size`: no whole number from 1 to 1e6).
        """
        names = [one.name for one in fields(CostModel) if one.name != "calibrated"]
        needed = [name for name in names if not name.startswith(("pass_", "prefix_"))]
        try:
            value = read_json(given_or_example(path))
        except OSError as error:
            raise UserError(f"cost file {path}: {error.strerror}") from None
        except UserError as error:
            raise UserError(f"cost file {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"cost file {path}: must be an object with keys {', '.join(needed)}")
        unknown, missing = sorted(set(value) - set(names)), sorted(set(needed) - set(value))
        if unknown:
            raise UserError(f"cost file {path}: unknown key {unknown[0]}; keys: {', '.join(names)}")
        if missing:
            raise UserError(f"cost file {path}: {', '.join(missing)} missing")
        for where in ("intra", "inter"):
            value.setdefault(f"prefix_{where}", value[f"transfer_{where}"])
        cost = CostModel(**value)
        try:
            cost.require_sound()
        except ValueError as error:
            raise UserError(f"cost file {path}: {error}") from None
        return cost

    def require_sound(self) -> None:
        """Raise ValueError for a value that is no number from 0 to 1e6 (of `node_size`: no whole
        number from 1 to 1e6)."""
        for name, number in vars(self).items():
            if name == "calibrated":
                continue
            whole = name == "node_size"
            kinds: tuple[type, ...] = (int, np.integer) if whole else (int, float, np.number)
            fits = isinstance(number, kinds) and not isinstance(number, bool)
            if not (fits and int(whole) <= number <= LARGEST):
                kind = "whole number from 1" if whole else "number from 0"
                raise ValueError(f"{name} = {number!r:.40} must be a {kind} to {LARGEST:,}")

    def compute_s(self, lengths: ArrayLike) -> Floats:
        """Seconds of each sequence alone on one rank, without the fixed part; same shape."""
        tokens = np.asarray(lengths, dtype=np.float64)
        seconds: Floats = tokens * (self.a * tokens + self.b)
        return seconds

    def ring_s(self, lengths: ArrayLike, ranks: Sequence[int]) -> float:
        """Seconds of one micro-batch of `lengths` on `ranks`; of an empty one, the fixed part."""
        tokens = np.asarray(lengths, dtype=np.float64)
        one_node = len({rank // self.node_size for rank in ranks}) == 1
        return float(self.seconds((tokens * tokens).sum(), tokens.sum(), len(ranks), one_node))

    def seconds(
        self,
        squares: ArrayLike,
        tokens: ArrayLike,
        size: ArrayLike,
        one_node: ArrayLike,
        before: ArrayLike = 0.0,
    ) -> Floats:
        """Seconds of micro-batches on rings of `size` ranks; the arguments broadcast.

        `squares` is the sum of squared lengths, `tokens` the sum of lengths, and `one_node` says
        whether the ring lies within a node. Of chunks, `squares` is the sum of end^2 - begin^2,
        and `before` the sum of the tokens before them.
        """
        squares, tokens = np.asarray(squares, np.float64), np.asarray(tokens, np.float64)
        before = np.asarray(before, np.float64)
        size = np.asarray(size, np.float64)
        shared = size > 1
        transfer = np.where(one_node, self.transfer_intra, self.transfer_inter) * shared
        again = np.where(one_node, self.prefix_intra, self.prefix_inter) * shared
        passed = tokens + before
        passing = np.where(one_node, self.pass_intra, self.pass_inter) * passed * (size - 1)
        attention = self.a * squares
        exposed = np.maximum(0.0, passing - attention) * shared
        work = attention + (self.b + transfer) * tokens + again * before + exposed
        seconds: Floats = self.fixed + self.latency * np.log2(size) + work / size
        return seconds
