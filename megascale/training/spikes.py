"""Losses that leap: noticed against what was usual in the steps before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from megascale.config import SpikeConfig
from megascale.errors import UserError

LEAST_STEPS = 20
"""Losses that are needed to know what is usual."""
NORMAL_MAD = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
LEAST_SPREAD = 0.005
"""The spread is taken to be at least this part of the median, however even the losses were."""


class SpikeWatch:
    """Knows which losses are usual. Its state is a function of the losses seen, so it is the same
    on every rank, and goes with the checkpoint."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self._losses: list[float] = []
        self.in_a_row = 0
        """Spikes since the last usual loss."""
        self.rolled_to: int | None = None
        """Step of the checkpoint that was gone back to last."""
        self.rolled_at: int | None = None
        """Step after which the run went back to it."""

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave. Raises UserError where `state` is nothing like it."""
        try:
            self._losses = self._known(state)
            self.in_a_row, self.rolled_to = int(state["in_a_row"]), state["rolled_to"]
            self.rolled_at = state.get("rolled_at", self.rolled_to)  # not there before 0.2
        except (KeyError, TypeError, ValueError):
            raise UserError("the checkpoint's record of losses is damaged") from None

    def _known(self, state: Mapping[str, Any]) -> list[float]:
        return [float(loss) for loss in state["losses"]][-self.config.window_steps :]

    @property
    def _enough(self) -> int:
        """Losses from which it follows what is usual."""
        return max(1, min(LEAST_STEPS, self.config.window_steps))

    @property
    def limit(self) -> float:
        """Loss, nats per token, above which a step spikes; infinite while too few are known."""
        if not self.config.window_steps or len(self._losses) < self._enough:
            return math.inf
        usual = median(self._losses)
        mad = median(abs(loss - usual) for loss in self._losses)
        spread = max(NORMAL_MAD * mad, LEAST_SPREAD * usual)
        return usual + self.config.deviations * spread

    @property
    def most_loss(self) -> float:
        """Loss above which a step's update is left out."""
        return math.inf if self.config.action == "warn" else self.limit

    @property
    def persists(self) -> bool:
        """Whether as many steps in a row spiked as `patience_steps`."""
        return self.in_a_row >= self.config.patience_steps

    def see(self, loss: float) -> bool:
        """Take the loss of a step; whether it is a spike. One that is not finite is."""
        if not self.config.window_steps:
            return False
        if not math.isfinite(loss) or loss > self.limit:
            self.in_a_row += 1
            return True
        self.in_a_row = 0
        self._losses = [*self._losses, loss][-self.config.window_steps :]
        return False

    def begin_anew(self) -> None:
        """Forget what was usual, because it is no more."""
        self._losses, self.in_a_row = [], 0

    def roll_back(self, state: Mapping[str, Any] | None, to: int, at: int) -> None:
        """Go back to the checkpoint of step `to`, after step `at`, and to what was usual there.

        `state` is what `to_json` gave there; None where other data was read there. Where it knows
        too few losses, what was usual before the spikes holds on. Raises UserError as `go_on`.
        """
        before = self._losses
        if state is not None:
            self.go_on(state)
        if len(self._losses) < self._enough:
            self._losses = before
        self.in_a_row, self.rolled_to, self.rolled_at = 0, to, at

    def is_settled(self, step: int) -> bool:
        """Whether the state after `step` is worth a checkpoint: with `rollback` not among spikes,
        and not until a rollback has had `patience_steps` to show whether it helps. Such checkpoints
        would take the place of those that can be gone back to."""
        if self.config.action != "rollback" or not self.config.window_steps:
            return True
        waits = self.rolled_at is not None and step < self.rolled_at + self.config.patience_steps
        return not waits and not self.in_a_row

    def to_json(self) -> dict[str, Any]:
        """As plain values for `json.dump`."""
        return {
            "losses": list(self._losses),
            "in_a_row": self.in_a_row,
            "rolled_to": self.rolled_to,
            "rolled_at": self.rolled_at,
        }
