"""When each micro-batch of a plan begins and ends, by a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megascale.planner.cost import CostModel
from megascale.planner.plan import StepPlan

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Timeline:
    """Begin and end of each ring of a plan, in seconds from the start of the step, [rings]."""

    begin_s: Seconds
    end_s: Seconds
    busy_s: Seconds
    """Seconds that each rank computes, [ranks]."""

    @property
    def total_s(self) -> float:
        """Seconds until the last rank is done."""
        return float(self.end_s.max(initial=0.0))

    @property
    def imbalance(self) -> float:
        """Step time over mean busy time of a rank; 1 is perfect, and so is an idle step."""
        mean_s = float(self.busy_s.mean())
        return self.total_s / mean_s if mean_s > 0 else 1.0


def timeline(plan: StepPlan, lengths: ArrayLike, cost: CostModel) -> Timeline:
    """Run `plan` on paper.

    A ring begins when all its ranks are free. In lockstep mode the ranks of an expert group
    also wait for each other after every micro-batch. With pipeline stages these are the times
    of one stage, without filling and draining the pipeline.
    """
    sequence_tokens = np.asarray(lengths, dtype=np.int64)
    begin_s, end_s = np.zeros(len(plan.rings)), np.zeros(len(plan.rings))
    free_s, busy_s = np.zeros(plan.num_ranks), np.zeros(plan.num_ranks)
    by_index = sorted(range(len(plan.rings)), key=lambda position: plan.rings[position].index)
    for _, positions in groupby(by_index, key=lambda position: plan.rings[position].index):
        if plan.mode == "lockstep":
            groups = free_s.reshape(-1, plan.expert_group)
            groups[:] = groups.max(axis=1, keepdims=True)
        for position in positions:
            ranks, sequences = list(plan.rings[position].ranks), plan.rings[position].sequences
            ring_s = cost.ring_s(sequence_tokens[list(sequences)], ranks)
            begin_s[position] = free_s[ranks].max()
            end_s[position] = begin_s[position] + ring_s
            free_s[ranks] = end_s[position]
            busy_s[ranks] += ring_s
    return Timeline(begin_s, end_s, busy_s)
