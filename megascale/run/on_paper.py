"""A run on a cluster on paper: what `megascale simulate CONFIG` replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megascale.arrays import Integers
from megascale.config import Layout, RunConfig
from megascale.devices.memory import fullest, with_capacity
from megascale.devices.step_time import StepCost, step_cost
from megascale.devices.table import Device
from megascale.errors import UserError
from megascale.planner import Problem
from megascale.planner.plan import Mode
from megascale.run.auto_capacity import with_capacity_of
from megascale.run.on_device import NamedDevice
from megascale.run.step_problem import following_batches, step_problem
from megascale.run.without_corpus import load_drawn_run, load_read_run
from megascale.simulate.step_lengths import MOST_SEQUENCES


@dataclass(frozen=True)
class RunOnPaper:
    """A run on devices that need not be there; a `simulate.cluster.OnPaper`."""

    model_name: str
    """Its config file."""
    config: RunConfig
    """With a number for the capacity."""
    layout: Layout
    device_name: str
    device: Device

    @property
    def context(self) -> int:
        """Where longer documents are cut."""
        return self.config.data.context_tokens

    @property
    def capacity(self) -> int:
        """Tokens of an HDP rank in a micro-batch."""
        return self.config.planner.capacity_tokens or 0

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.config.data.global_batch_tokens

    @property
    def mode(self) -> Mode:
        """Mode of planning."""
        return self.layout.mode

    @property
    def offload(self) -> str:
        """How fast activations may go to host memory."""
        rate = self.config.planner.host_copy_bytes_per_s
        return "none" if rate is None else f"at {rate / 1e9:g} GB/s"

    @cached_property
    def cost(self) -> StepCost:
        """What steps cost, as `megascale plan --device` has it."""
        return step_cost(self.config, self.layout, self.device)

    def problem(self, lengths: ArrayLike) -> Problem:
        """A step of sequences of `lengths` tokens."""
        return step_problem(self.config, self.layout, lengths, self.cost.cost)

    def peak_bytes(self, kept_tokens: int) -> int:
        """Memory of a device whose HDP rank keeps activations of so many tokens."""
        return fullest(with_capacity(self.config, kept_tokens), self.layout, self.device)

    def rates(self) -> str:
        """Where rates come from."""
        measured = self.config.planner.cost
        micro_batches = f"Micro-batches are as measured ({measured}). " if measured else ""
        return f"{micro_batches}Rates have assumed efficiencies; they are those of"

    def to_json(self) -> dict[str, Any]:
        """Everything that times and memory follow from, as plain values."""
        return {
            "config": self.model_name,
            "layout": asdict(self.layout),
            "device_name": self.device_name,
            "device": asdict(self.device),
            "context": self.context,
            "capacity": self.capacity,
            "batch_tokens": self.batch_tokens,
            "mode": self.mode,
            "offload": self.offload,
            "cost": asdict(self.cost.cost),
        }


def run_config(
    path: str | Path, overrides: Sequence[str], lengths: str | None, steps: int
) -> tuple[RunConfig, list[Integers]]:
    """A finalized config, and the lengths of each of its first `steps` steps.

    `lengths` is None for the corpora of the run, else what they are drawn from, as for
    `load_drawn_run`. Step 0 is that of `megascale plan`. Raises UserError for bad input, and for
    more than MOST_SEQUENCES.
    """
    if lengths is None:
        run = load_read_run(path, overrides)
        config, batches = run.config, following_batches(run.config, run.sources)
    else:
        drawn = load_drawn_run(path, overrides, lengths, {})
        config, batches = drawn.config, drawn.batches()
    found: list[Integers] = []
    for batch in islice(batches, steps):
        found.append(batch.length.astype(np.int64))
        if sum(map(len, found)) > MOST_SEQUENCES:
            raise UserError(
                f"--steps {steps}: more than {MOST_SEQUENCES:,} sequences by step {len(found)}; "
                "give fewer"
            )
    return config, found


def on_paper(path: str, config: RunConfig, layout: Layout, on: NamedDevice) -> RunOnPaper:
    """The run of a config on a device, whose capacity is known then. Raises UserError."""
    return RunOnPaper(path, with_capacity_of(config, layout, *on), layout, *on)
